"""The demo's controls: who learns from what, and records of several seeds in one folder."""

from dataclasses import replace

import pytest

from bayestune.adapters import Lora
from bayestune.evaluation import read_records
from studies import demo_controls as study
from tests.hub_files import write_model


def test_the_student_with_a_temperature_learns_from_no_question_that_it_is_fitted_on():
    (whole, on_all), (fewer, on_fewer) = study.controls(study.demo_task())
    assert len(whole.unlabelled) == 264
    assert len(fewer.unlabelled) == 144
    held_out = {row.fingerprint for row in fewer.held_out}
    assert not held_out & {row.fingerprint for row in fewer.unlabelled}
    assert study.LABELS.keys() <= {*on_all, *on_fewer}


@pytest.fixture
def small(monkeypatch):
    """The study's settings, small."""
    few = replace(study.QUESTIONS, train_rows=6, evaluation_rows=5, unlabelled_rows=4)
    monkeypatch.setattr("bayestune.cli.demo.QUESTIONS", few)
    monkeypatch.setattr(study, "QUESTIONS", few)
    training = replace(study.TRAINING, lora=Lora(rank=2), steps=2, bf16=False)
    monkeypatch.setattr(study, "TRAINING", training)
    monkeypatch.setattr(study, "STUDENT_STEPS", 2)
    monkeypatch.setattr("bayestune.cli.demo.STUDENT_STEPS", 2)
    monkeypatch.setattr(study, "PREDICTING", replace(study.PREDICTING, draws=(0, 2)))


def test_seeds_are_added_once_and_each_record_has_its_rows(small, llama, byte_level, tmp_path):
    model = write_model(tmp_path / "model", llama(), byte_level)
    results = tmp_path / "results"
    arguments = ["--model", str(model), "--fits", str(tmp_path / "fits")]
    arguments += ["--results", str(results)]
    study.main([*arguments, "--seeds", "1"])
    study.main([*arguments, "--seeds", "1", "2"])
    records = read_records(results)
    first = [record["label"] for record in records if record["seed"] == 1]
    assert [record["label"] for record in records if record["seed"] == 2] == first
    assert {"BLoB N=0", "BLoB N=2", *study.LABELS.values()} <= set(first)
    assert len({record["predictions"] for record in records}) == len(records)
    assert all((results / record["predictions"]).is_file() for record in records)
