"""The user's own rows."""

import csv
import json

import pytest

from bayestune.data import load_rows


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def test_rows_of_json_lines(tmp_path):
    path = write_lines(
        tmp_path / "own.jsonl",
        {"id": 0, "question": "index", "options": ["x", "y", "z"], "answer": "z"},
        {"text": "letter", "choices": ["x", "y", "z"], "answer": "y"},
        {"question": "text", "options": [10, 20], "answer": " 20 ", "context": "a\u2028b"},
        {"question": "first", "options": ["B", "A"], "answer": "A"},
    )
    rows = load_rows(path, answer_is="text")
    assert [row.options[row.answer] for row in rows] == ["z", "y", "20", "A"]
    assert [row.id for row in rows] == ["0", "own.jsonl:2", "own.jsonl:3", "own.jsonl:4"]
    assert [row.question for row in rows] == ["index", "letter", "text", "first"]
    assert [row.context for row in rows] == ["", "", "a\u2028b", ""]


def test_rows_of_csv(tmp_path):
    path = tmp_path / "own.csv"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "options", "answer", "context"])
        writer.writerow(["json", json.dumps(["x, y", "z"]), "1", ""])
        writer.writerow(["bars\nand a line", "x | y|z", "1", "a passage"])
        writer.writerow(["all", "", "0", ""])
    rows = load_rows(path, options=("yes", "no"))
    assert [row.options for row in rows] == [("x, y", "z"), ("x", "y", "z"), ("yes", "no")]
    assert [row.answer for row in rows] == [1, 1, 0]
    assert rows[1].question == "bars\nand a line"
    assert [row.context for row in rows] == ["", "a passage", ""]


def test_options_of_all_rows_and_rows_without_an_answer(tmp_path):
    rows = ({"question": "a"}, {"question": "b", "answer": "no"}, {"text": "c"})
    path = write_lines(tmp_path / "own.jsonl", *rows)
    found = load_rows(path, options=["yes", "no"], labelled=False)
    assert [row.answer for row in found] == [None, 1, None]
    assert {row.options for row in found} == {("yes", "no")}
    with pytest.raises(ValueError, match=r"row own\.jsonl:1: no column 'answer'"):
        load_rows(path, options=["yes", "no"])


@pytest.mark.parametrize("answer", [3, -1, "D", "w", "1.5", "²"])
@pytest.mark.parametrize("labelled", [True, False])
def test_an_answer_that_is_not_an_option(tmp_path, answer, labelled):
    row = {"question": "?", "options": ["x", "y", "z"], "answer": answer}
    path = write_lines(tmp_path / "own.jsonl", row)
    with pytest.raises(ValueError, match=r":1: the right answer .* is not among .*'x', 'y', 'z'\]"):
        load_rows(path, labelled=labelled)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": 0}, r"no column 'question' or 'text'; got the columns \['answer'\]"),
        ({"question": "?"}, "no options; give a column 'options'"),
        ({"question": "?", "options": ["x"], "answer": 0}, "got 1 options, expected at least two"),
        ({"question": "?", "options": '["x", "y'}, "got options .*x.*, expected a JSON list"),
        ({"question": "?", "options": 7}, "got options 7, expected a list of texts"),
    ],
)
def test_a_row_that_cannot_be_read(tmp_path, row, message):
    path = write_lines(tmp_path / "own.jsonl", row)
    with pytest.raises(ValueError, match=rf"row own\.jsonl:1: {message}"):
        load_rows(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [("own.jsonl", ""), ("own.jsonl", "\n\n"), ("own.csv", ""), ("own.csv", "question,options\n")],
)
def test_an_empty_file(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name} is empty: expected at least one row"):
        load_rows(tmp_path / name)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file: .*own\.csv"):
        load_rows(tmp_path / "own.csv")
