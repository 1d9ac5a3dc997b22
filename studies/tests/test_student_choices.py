"""The study of students: rows in other orders, fresh starts, and a run that goes on."""

import pytest

from bayestune.data import Question
from bayestune.whole_files import read_json_lines
from studies import student_choices as study


def test_reordered_rows_have_their_options_in_other_orders_and_no_answer():
    rows = [Question("1", "q", ("a", "b", "c", "d"), 1), Question("2", "r", ("x", "y"), 0)]
    found = study.reordered(rows, 3, seed=0)
    assert found[:2] == tuple(rows)
    assert [row.id for row in found] == ["1", "2"] * 3
    for row, other in zip(rows * 2, found[2:], strict=True):
        assert sorted(other.options) == sorted(row.options)
        assert other.answer is None
    assert len({row.options for row in found if row.id == "1"}) > 1


@pytest.fixture
def options(real, tmp_path):
    """A short run on a tiny model and data set."""
    kept = ["--fits", str(tmp_path / "fits"), "--json", str(tmp_path / "records.jsonl")]
    counts = ["--train_rows", "4", "--unlabelled_rows", "2", "--rows", "3"]
    return ["run", *real, "--task", "arc_easy", *counts, *kept]


def test_a_run_goes_on_and_a_fresh_student_has_its_rank(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "TRAINING", study.replace(study.TRAINING, steps=2))
    short = study.Distilled(steps=2)
    arms = [study.replace(arm, method=short) for arm in study.ARMS if arm.rows != "foreign"]
    monkeypatch.setattr(study, "ARMS", arms)
    ranks = []
    learn = study.Distilled.learn

    def seen(*arguments):
        student = learn(*arguments)
        ranks.append(student.model.peft_config["default"].r)  # type: ignore[index, union-attr]
        return student

    monkeypatch.setattr(study.Distilled, "learn", seen)
    lines = ["MLE", "teacher's mean", "teacher, 10 draws", "default"]
    study.main([*options, "--lines", *lines])
    lines += ["options in three orders", "afresh, rank 2"]
    study.main([*options, "--lines", *lines])
    records = read_json_lines(tmp_path / "records.jsonl")
    assert [record["line"] for record in records] == lines
    assert ranks == [8, 8, 2]
    capsys.readouterr()
    study.main(["table", "--json", str(tmp_path / "records.jsonl")])
    assert capsys.readouterr().out.count("\n| ") == 1 + len(lines)
