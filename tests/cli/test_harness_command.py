"""`lm-eval` without its extra, and what is refused before a model is loaded."""

import sys

import pytest

from bayestune.cli import main
from running import failed


def test_a_missing_extra_is_refused_with_what_installs_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for name in ("lm_eval", "harness_tasks"):
        monkeypatch.delitem(sys.modules, f"bayestune.evaluation.{name}", raising=False)
    line = failed(["lm-eval", "--posterior", tmp_path, "--tasks", "arc_easy"], capsys)
    assert line.startswith("bayestune: error: got no lm_eval")
    assert line.endswith("expected lm-evaluation-harness; pip install 'bayestune[lm-eval]'")


def test_tasks_must_be_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["lm-eval", "--posterior", str(tmp_path)])
    assert "tasks" in capsys.readouterr().err
