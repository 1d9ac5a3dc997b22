"""The house rules that a machine can check: imports, public names, how a line reads."""

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bayestune

SOURCE = Path(__file__).parents[1] / "src/bayestune"
ORDER = [
    "errors",
    "runtime",
    "whole_files",
    "metrics",
    "decisions",
    "adapters",
    "kl",
    "forward",
    "curvature",
    "posteriors",
    "generation",
    "data",
    "models",
    "scoring",
    "training",
    "methods",
    "evaluation",
    "session",
    "report",
    "sharing",
    "bench",
    "serving",
    "cli",
]
MODULES = sorted(SOURCE.rglob("*.py"))
MAY_BE_LAZY = {"matplotlib", "ray", "datasets"}


def dotted(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {dotted(path) for path in MODULES}


def room(module: str) -> str:
    return [*module.split("."), ""][1]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(node: ast.AST) -> list[str]:
    """The modules that an import statement names; nothing for other nodes."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        whole = [f"{node.module}.{alias.name}" for alias in node.names]
        return [name if name in NAMES else str(node.module) for name in whole]
    return []


def imports(path: Path) -> set[str]:
    return {name for node in ast.walk(tree(path)) for name in imported(node)}


def test_every_room_has_its_place_in_the_order():
    assert {room(dotted(path)) for path in MODULES} - {"", "__main__"} == set(ORDER)


def test_the_top_level_stays_small():
    entries = [p for p in SOURCE.iterdir() if p.name != "__pycache__"]
    assert len(entries) <= 26, sorted(p.name for p in entries)


@pytest.mark.parametrize("path", [p for p in MODULES if room(dotted(p)) in ORDER], ids=dotted)
def test_imports_only_go_down(path):
    own = room(dotted(path))
    used = {room(name) for name in imports(path) if name.startswith("bayestune.")} & set(ORDER)
    above = {name for name in used if ORDER.index(name) > ORDER.index(own)}
    assert not above, f"{dotted(path)} imports {above}, which come after it"
    inside = path.name != "__init__.py" and path.parent != SOURCE
    assert not inside or f"bayestune.{own}" not in imports(path), "imports its own package"


def test_no_modules_import_each_other():
    graph = {dotted(path): imports(path) & NAMES for path in MODULES}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " → ".join((*way, module))
        if module not in done:
            for name in graph[module] - {"bayestune"}:
                visit(name, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_nothing_is_imported_late_but_what_is_heavy_and_optional(path):
    late = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef):
            late |= {name.split(".")[0] for inner in ast.walk(node) for name in imported(inner)}
    assert late <= MAY_BE_LAZY


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_only_the_seam_imports_peft_and_nobody_pickles(path):
    tops = {name.split(".")[0] for name in imports(path)}
    assert "pickle" not in tops
    seam = room(dotted(path)) == "adapters" or dotted(path) == "bayestune.posteriors.storage"
    assert "peft" not in tops or seam
    assert "torch.load(" not in path.read_text(encoding="utf-8")


def test_every_public_name_is_there_and_listed():
    assert set(bayestune.__all__) <= set(dir(bayestune))
    for name in bayestune.__all__:
        assert getattr(bayestune, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = bayestune.nothing


@pytest.mark.parametrize("name", [room for room in ORDER if (SOURCE / room).is_dir()])
def test_a_package_says_what_it_is_for_and_hides_none_of_its_modules(name):
    package = importlib.import_module(f"bayestune.{name}")
    assert package.__doc__
    assert package.__doc__.count(".") >= 2
    assert all(hasattr(package, public) for public in package.__all__)
    modules = {found.name for found in pkgutil.iter_modules(package.__path__)}
    assert not modules & set(package.__all__), "a public name hides a module"


def test_a_module_name_stands_for_one_thing():
    names = [path.stem for path in MODULES if path.stem not in ("__init__", "__main__")]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize(
    ("module", "heavy"),
    [("bayestune", {"torch", "matplotlib"}), ("bayestune.cli", {"matplotlib", "gguf"})],
)
def test_importing_loads_nothing_heavy_before_it_is_needed(module, heavy):
    code = f"import sys, {module}; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_classes_that_docstrings_name_exist():
    nodes = [node for path in MODULES for node in ast.walk(tree(path))]
    known = {node.name for node in nodes if isinstance(node, ast.ClassDef)}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            known |= {alias.name for alias in node.names}
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    text = "\n".join(ast.get_docstring(n) or "" for n in nodes if isinstance(n, documented))
    named = set(re.findall(r"`([A-Z][A-Za-z]*[a-z][A-Za-z]*)(?:\([^`]*)?`", text))
    assert named - known == set()


WITHOUT_PARAMETERS = {
    "METHODS",
    "Method",
    "Posterior",
    "Refusal",
}  # a table, two protocols, an error


@pytest.mark.parametrize("name", sorted({*bayestune.__all__} - WITHOUT_PARAMETERS))
def test_a_public_name_explains_its_parameters(name):
    public = getattr(bayestune, name)
    text = inspect.getdoc(public) or ""
    for parameter in inspect.signature(public).parameters:
        assert re.search(rf"^ +{parameter}: |`{parameter}`", text, re.MULTILINE), parameter


# The tests


def test_test_files_have_names_of_their_own():
    files = Path(__file__).parent.rglob("*.py")
    names = [path.name for path in files if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names)), "pytest imports them by name alone"


# How a line reads

LOOPS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def has_loop(node: ast.AST) -> bool:
    return any(isinstance(inner, LOOPS) for inner in ast.walk(node))


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_no_comprehension_stands_inside_another(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, LOOPS):
            assert not any(has_loop(child) for child in ast.iter_child_nodes(node)), node.lineno


def test_few_assignments_are_parallel():
    parallel = []
    count = 0
    for path in MODULES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
                count += 1
            unpacks = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple)
            if unpacks and isinstance(node.value, ast.Tuple):
                parallel.append(f"{dotted(path)}:{node.lineno}")
    assert len(parallel) < 0.04 * count, parallel


def test_functions_and_files_stay_small():
    long = []
    for path in MODULES:
        lines = path.read_text(encoding="utf-8").count("\n")
        if lines > 300:
            long.append(f"{dotted(path)}: {lines} lines")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef):
                doc = ast.get_docstring(node, clean=False) or ""
                size = (node.end_lineno or 0) - node.lineno + 1 - doc.count("\n")
                if size > 50:
                    long.append(f"{dotted(path)}: {node.name} has {size} lines")
    assert not long
