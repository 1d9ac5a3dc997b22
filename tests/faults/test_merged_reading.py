"""What is wrong with one row of a file spoils no other, whatever the file's kind."""

import gzip
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from bayestune.cli.run_files import delete_own
from bayestune.cli.run_settings import fit_settings, write_settings
from bayestune.data import Question, ReadOptions, Task, load_rows, sort_rows
from bayestune.data.prompts import CHOICES
from bayestune.errors import Refusal
from bayestune.methods import Distilled, EarlyStopping, Ensemble, check_method
from bayestune.session import TaskOptions, lines_of_all_rows, with_classes_of_fit
from bayestune.training import Training

OPTIONS = ("yes", "no")
ROWS = [{"id": f"r{i}", "text": f"Question {i}"} for i in range(4)]
BAD = [*ROWS[:2], {"id": "r2", "text": None}, *ROWS[3:]]


def lines(rows):
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def table(separator, encoding="utf-8"):
    return pd.DataFrame(BAD).to_csv(sep=separator, index=False).encode(encoding)


FILES = {
    "own.jsonl": lines(BAD),
    "own.json": json.dumps(BAD).encode(),
    "own.csv": table(","),
    "semicolons.csv": table(";"),
    "excel.csv": table("\t", "utf-16"),
    "own.tsv": table("\t"),
    "own.csv.gz": gzip.compress(table(","), mtime=0),
    "own.jsonl.gz": gzip.compress(lines(BAD), mtime=0),
}


@pytest.mark.parametrize("name", [*FILES, "own.parquet"])
def test_a_bad_row_spoils_no_other(tmp_path, name):
    path = tmp_path / name
    if name in FILES:
        path.write_bytes(FILES[name])
    else:
        pd.DataFrame(BAD).to_parquet(path)
    found = sort_rows(path, ReadOptions(OPTIONS))
    assert [row.id for row in found.questions] == ["r0", "r1", "r3"]
    ((number, (key, problem)),) = found.problems.items()
    assert (number, key) == (2, "r2")
    with pytest.raises(Refusal, match="no column 'question'"):
        load_rows(path, OPTIONS, labelled=False)
    told = list(lines_of_all_rows(found, iter({"id": row.id} for row in found.questions)))
    assert [line["id"] for line in told] == ["r0", "r1", "r2", "r3"]
    assert told[2]["error"] == str(problem)
    rest = list(lines_of_all_rows(found, iter([{"id": "r3"}]), start=2))
    assert rest == told[2:]


def test_lines_and_cells_that_cannot_be_read_stand_alone(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_bytes(lines(ROWS[:1]) + b"{oops\n[1]\n" + lines(ROWS[1:2]))
    found = sort_rows(path, ReadOptions(OPTIONS))
    assert {n: key for n, (key, _) in found.problems.items()} == {
        1: "own.jsonl:2",
        2: "own.jsonl:3",
    }
    path = tmp_path / "own.csv"
    path.write_bytes(b"id,text\na,hello, world\nb,fine\n\nc\n")
    found = sort_rows(path, ReadOptions(OPTIONS))
    assert [row.id for row in found.questions] == ["b"]
    assert [key for key, _ in found.problems.values()] == ["a", "c"]


def test_a_bad_answer_spoils_no_other_but_one_rule_holds(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_bytes(lines([{**ROWS[0], "answer": "no"}, {**ROWS[1], "answer": "nope"}, ROWS[2]]))
    found = sort_rows(path, ReadOptions(OPTIONS))
    assert [row.answer for row in found.questions] == [1, None]
    assert "did you mean 'no'" in str(found.problems[1][1])
    path.write_bytes(lines([{**ROWS[0], "answer": "B"}, {**ROWS[1], "answer": "1"}]))
    with pytest.raises(Refusal, match="one kind of answer in the whole file"):
        sort_rows(path, ReadOptions(OPTIONS))
    path.write_bytes(lines([{**ROWS[0], "answer": 7}]))
    with pytest.raises(Refusal, match="expected an index from 0"):
        sort_rows(path, ReadOptions(OPTIONS))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("own.csv.gz", gzip.compress(table(","), mtime=0)[:30]),
        ("own.gz", b"\x1f\x8b nothing"),
        ("own.parquet", b"PAR1 and no more"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Refusal, match=rf"{name} is (damaged|no whole)"):
        load_rows(tmp_path / name)


def test_options_that_no_row_needs_are_named_once_and_only_if_given(tmp_path, caplog):
    path = tmp_path / "own.jsonl"
    path.write_bytes(lines([{**row, "options": ["a", "b"]} for row in ROWS]))
    sort_rows(path, ReadOptions(otherwise=OPTIONS))
    load_rows(path, ("b", "a"), labelled=False)
    assert not caplog.messages
    TaskOptions(evaluation_data=path, options=OPTIONS).load(labelled=False)
    assert caplog.messages == ["own.jsonl: `options` are not used: every row has its own"]


def test_a_row_of_other_classes_than_the_heads_stands_alone(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_bytes(lines([ROWS[0], {**ROWS[1], "options": ["no", "perhaps"]}, ROWS[2]]))
    prompt = {"letter": CHOICES.letter, "text": CHOICES.text}
    details = {"scoring": "head", "class_names": ["no", "yes"], "task": {"prompt": prompt}}
    rows = sort_rows(path, ReadOptions(OPTIONS))
    found = with_classes_of_fit(rows, details)
    assert [(row.id, row.options) for row in found.questions] == [
        ("r0", ("no", "yes")),
        ("r2", ("no", "yes")),
    ]
    assert "perhaps" in str(found.problems[1][1])
    assert with_classes_of_fit(rows, {**details, "scoring": "letter"}) is rows
    with pytest.raises(Refusal, match="expected the classes"):
        with_classes_of_fit(rows, {**details, "class_names": ["x", "y"]})


# Rows without answers, and what learns on them


def test_unlabelled_rows_are_checked_and_counted(tmp_path):
    train = tmp_path / "train.jsonl"
    train.write_bytes(lines([{**row, "answer": i % 2} for i, row in enumerate(ROWS)]))
    spare = tmp_path / "spare.jsonl"
    spare.write_bytes(lines([{"text": "More", "context": "of this"}]))
    options = TaskOptions(data=train, options=OPTIONS, unlabelled_data=spare)
    with pytest.raises(Refusal, match="unlabelled rows have a context"):
        options.load()
    with pytest.raises(Refusal, match="unlabelled_rows: got -1"):
        replace(options, unlabelled_rows=-1)
    settings = []
    for text in ("More", "Other"):
        spare.write_bytes(lines([{"text": text}]))
        asked = (options, options.load(), "float32")
        settings.append(fit_settings(None, asked, Training(), {"distilled": Distilled()}))
    name = "the rows of --unlabelled_data"
    assert settings[0][name] != settings[1][name]
    assert "unlabelled_data" not in settings[0]


def test_what_chooses_on_held_out_rows_is_refused_before_other_fits():
    task = Task("t", tuple(Question(str(i), "?", OPTIONS, i % 2) for i in range(4)), ())
    scorer = SimpleNamespace(task=task)
    for method in (EarlyStopping(), Ensemble(EarlyStopping()), Distilled(EarlyStopping())):
        with pytest.raises(Refusal, match="EarlyStopping chooses on held-out rows"):
            check_method(method, scorer, None)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"learning_rate": float("nan")}, {"draws": 0}])
def test_a_student_of_nonsense_is_refused(wrong):
    with pytest.raises(Refusal, match=rf"Distilled\.{next(iter(wrong))}: got"):
        Distilled(**wrong)
    with pytest.raises(Refusal, match=r"EarlyStopping\.every: got 0"):
        EarlyStopping(every=0)


def test_overwriting_leaves_no_best_step_or_teacher_to_resume_from(tmp_path):
    write_settings(tmp_path, {"method": "distilled"})
    kept = ("checkpoints/best.json", "checkpoints/base/best.safetensors")
    kept += ("checkpoints/taught/teacher.json", "checkpoints/student/checkpoint-3/optimizer.pt")
    theirs = ("best.json", "taught/notes.txt", "checkpoints/thesis.tex")
    for name in (*kept, *theirs):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    delete_own(tmp_path)
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(os.fspath(path.relative_to(tmp_path)) for path in left) == sorted(theirs)
    assert not Path(tmp_path, "checkpoints", "taught").exists()
