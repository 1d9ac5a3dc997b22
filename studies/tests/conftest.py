"""The tiny model, tokenizer and task of the product's tests, and a study's run."""

import json
import sys

import pytest

from studies.official import ABSENT
from tests.conftest import byte_level, llama, tiny_task
from tests.hub_files import write_arc, write_model

__all__ = ["byte_level", "llama", "tiny_task"]


@pytest.fixture
def real(llama, byte_level, tmp_path):
    """Options of a "real" model and data set, which are tiny."""
    model = write_model(tmp_path / "model", llama(), byte_level)
    return ["--model", str(model), "--data_root", str(write_arc(tmp_path / "data"))]


@pytest.fixture
def imports_undone(monkeypatch):
    """Undoes what importing a checkout of the authors' code changes."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", sys.dont_write_bytecode)
    before = set(sys.modules)
    yield
    theirs = ("modelwrappers", "utils", "dataset", "run")
    for name in set(sys.modules) - before:
        if name in ABSENT or name.split(".")[0] in theirs:
            del sys.modules[name]


@pytest.fixture
def run(tmp_path, capsys):
    """Runs a study; returns its record."""

    def run(study, *arguments):
        file = tmp_path / "runs.jsonl"
        quick = ["--threads", "1", "--repeats", "2", "--warmup", "1", "--allocator", "stock"]
        study.main([*map(str, arguments), *quick, "--json", str(file)])
        capsys.readouterr()
        return json.loads(file.read_text(encoding="utf-8").splitlines()[-1])

    return run
