"""The house rules that a machine can check: imports go one way, nothing is pickled, nothing heavy is imported early."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import bayestune

SOURCE = Path(__file__).parents[1] / "src/bayestune"
ORDER = [
    "allocator",
    "gaussian",
    "layers",
    "lora",
    "snapshot",
    "common",
    "posterior",
    "prefix",
    "drawing",
    "forms",
    "artefact",
    "questions",
    "tasks",
    "models",
    "tokens",
    "scoring",
    "kfac",
    "kl",
    "order",
    "attention",
    "watch",
    "training",
    "metrics",
    "evaluation",
    "adaptive",
    "methods",
    "report",
    "runs",
    "commands",
    "benchmark",
    "demo",
    "cli",
]
MODULES = sorted(SOURCE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "bayestune":
            found |= {f"bayestune.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_every_room_has_its_place_in_the_order():
    assert {room(path) for path in MODULES} - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("path", [p for p in MODULES if room(p) != "__init__"], ids=lambda p: p.stem)
def test_imports_only_go_down(path):
    own = ORDER.index(room(path))
    used = {name.split(".")[1] for name in imports(path) if name.startswith("bayestune.")} - {"__version__"}
    above = {name for name in used & set(ORDER) if ORDER.index(name) > own}
    assert not above, f"{path.name} imports {above}, which come after it"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_only_the_seam_imports_peft_and_nobody_pickles(path):
    tops = {name.split(".")[0] for name in imports(path)}
    assert "pickle" not in tops
    assert "peft" not in tops or path.name in ("lora.py", "artefact.py")
    assert "torch.load(" not in path.read_text(encoding="utf-8")


def test_every_public_name_is_there():
    for name in bayestune.__all__:
        assert getattr(bayestune, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = bayestune.nothing


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, bayestune; print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_commands_load_neither_plots_nor_gguf_before_they_are_needed():
    code = "import sys, bayestune.cli; print([m for m in ('matplotlib', 'gguf') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_functions_and_files_stay_small():
    long = []
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > 320:
            long.append(f"{path.name}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                doc = ast.get_docstring(node, clean=False) or ""
                size = (node.end_lineno or 0) - node.lineno + 1 - doc.count("\n")
                if size > 50:
                    long.append(f"{path.name}: {node.name} has {size} lines")
    assert not long
