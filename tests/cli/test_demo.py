"""The demo at tiny size: what it compares, and on which questions."""

import importlib
from dataclasses import replace

import pytest

from bayestune.adapters import Lora
from bayestune.cli import main
from bayestune.evaluation import read_records
from bayestune.methods import MLE, BLoB
from bayestune.posteriors import posterior_digest, read_details
from running import furnish


@pytest.fixture
def demo(monkeypatch):
    """The module, its settings small."""
    module = importlib.import_module("bayestune.cli.demo")
    few = replace(module.QUESTIONS, train_rows=6, evaluation_rows=5, unlabelled_rows=4)
    training = replace(module.TRAINING, lora=Lora(rank=2), steps=2, bf16=False)
    monkeypatch.setattr(module, "QUESTIONS", few)
    monkeypatch.setattr(module, "TRAINING", training)
    monkeypatch.setattr(module, "STUDENT_STEPS", 2)
    monkeypatch.setattr(module, "PREDICTING", replace(module.PREDICTING, draws=(0, 2)))
    return module


def test_no_question_has_two_parts():
    module = importlib.import_module("bayestune.cli.demo")
    task = module.demo_task()
    parts = [task.train, task.unlabelled, task.evaluation]
    assert [len(part) for part in parts] == [96, 264, 240]
    contents = {row.content for part in parts for row in part}
    assert len(contents) == 96 + 264 + 240
    assert all(row.answer is None for row in task.unlabelled)
    assert len(task.held_out) == 120
    spare = {row.content for row in task.unlabelled}
    assert {row.content for row in task.held_out} <= spare


def test_the_demo_compares_all_with_two_fits(
    demo, tmp_path, llama, byte_level, monkeypatch, capsys
):
    place = furnish(tmp_path, llama(), byte_level)
    fits = []
    for method in (MLE, BLoB):

        def fit(self, *given, fit=method.fit):
            fits.append(type(self).__name__)
            return fit(self, *given)

        monkeypatch.setattr(method, "fit", fit)
    out = place / "out"
    assert main(["demo", f"--model={place / 'model'}", f"--output={out}"]) == 0
    assert fits == ["MLE", "BLoB"]
    labels = [record["label"] for record in read_records(out)]
    assert labels == ["MLE", "MLE + temperature", "BLoB N=0", "BLoB N=2", "Student of BLoB"]
    teacher = read_details(out / "distilled")["facts"]["teacher"]
    assert teacher["digest"] == posterior_digest(out / "blob")
    assert teacher["rows"] == 2 * 4  # of 124, as many as two steps reach
    printed = capsys.readouterr().out
    assert "Student of BLoB" in printed
    assert "finished in" in printed
    assert (out / "report.html").is_file()
