"""The Python of the README runs, in order, where the reader's own model and data exist."""

import re
import tomllib
from pathlib import Path

import torch
from transformers import TrainingArguments

from bayestune.evaluation import read_records
from bayestune.report import evaluation_tables, render, renewed

README = Path(__file__).parents[1] / "README.md"


def test_the_code_of_the_readme_runs(llama, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    ids = torch.randint(3, 400, (8, 9))
    namespace = {
        "base": llama(),
        "dataset": [{"input_ids": row, "labels": row} for row in ids],
        "arguments": TrainingArguments(
            output_dir=str(tmp_path / "out"),
            max_steps=4,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        ),
        "batch": {"input_ids": ids[:2]},
        "folder": tmp_path / "posterior",
    }
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["prediction"].probabilities.shape == (2, 2)
    assert (tmp_path / "posterior" / "posterior.json").is_file()


def test_the_tables_are_what_the_kept_rows_give_today():
    readme = README.read_text(encoding="utf-8")
    for name in ("demo", "arc_easy"):
        folder = README.parent / "results" / name
        text = render(evaluation_tables(renewed(read_records(folder), folder)), "markdown")
        assert (folder / "table.md").read_text(encoding="utf-8") == text + "\n"
        assert name != "demo" or all(line in readme for line in text.splitlines()[2:7])


def test_the_links_of_the_readme_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text(encoding="utf-8")):
        assert (README.parent / target).exists(), target


def test_pages_install_extras_that_exist_and_from_a_checkout():
    root = README.parent
    declared = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pages = [README, *root.glob("docs/**/*.md"), *root.glob("examples/*.py")]
    lines = [line for page in pages for line in page.read_text(encoding="utf-8").splitlines()]
    extras = re.findall(r"pip install ['\"](\S*)\[([\w,-]+)\]", "\n".join(lines))
    assert {place for place, _ in extras} == {"."}, "the package is on no index"
    named = {extra for _, names in extras for extra in names.split(",")}
    assert named <= set(declared["optional-dependencies"])
    shown = next(line for line in lines if "extras: " in line).partition("extras: ")[2]
    assert all(re.search(rf"\b{extra}\b", shown) for extra in declared["optional-dependencies"])
