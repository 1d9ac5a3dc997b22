"""Files with names of their own: which column is what, classes from answers, conversations."""

import csv
import json

import pytest

from bayestune.data import ReadOptions, load_rows, read_rows, sort_rows

COLUMNS = {"question": "Ticket Subject", "context": "body", "answer": "queue"}
TICKETS = [("no invoice", "dear all", "billing"), ("crash", "help", "technical")] * 2


def tickets(folder, name="own.csv", rows=TICKETS, header=("Ticket Subject", "body", "queue")):
    path = folder / name
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerows([header, *rows])
    return path


def lines(folder, *rows, name="own.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_named_columns_are_read_and_known_names_are_not_theirs_then(tmp_path, caplog):
    header = ("Ticket Subject", "body", "queue", "question", "label")
    rows = [(*row, "not this", "nor this") for row in TICKETS]
    path = tickets(tmp_path, rows=rows, header=header)
    found = load_rows(path, ("technical", "billing"), columns={**COLUMNS, "answer": "QUEUE"})
    assert [row.question for row in found[:2]] == ["no invoice", "crash"]
    assert [row.context for row in found[:2]] == ["dear all", "help"]
    assert [row.answer for row in found[:2]] == [1, 0]
    assert "columns not used: question, label" in caplog.text


def test_a_named_column_that_is_not_there_is_refused(tmp_path):
    path = tickets(tmp_path)
    message = r"own.csv: got the columns .*expected 'sujbect' for the question; correct the name"
    with pytest.raises(ValueError, match=message):
        load_rows(path, ("a", "b"), columns={"question": "sujbect"})
    with pytest.raises(ValueError, match="did you mean 'queue'"):
        load_rows(path, ("a", "b"), columns={**COLUMNS, "answer": "queues"})
    asked = tickets(tmp_path, "asked.csv", [("no invoice", "x")], ("ticket subject", "body"))
    (row,) = load_rows(asked, ("a", "b"), columns=COLUMNS, labelled=False)
    assert row.answer is None
    with pytest.raises(ValueError, match="expected 'queue' for the answer"):
        load_rows(asked, ("a", "b"), columns=COLUMNS)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"qestion": "a"}, r"got 'qestion', expected among .*did you mean 'question'"),
        ({"question": "a", "answer": "A"}, r"got \['a'\] for two roles"),
        ({"question": " "}, r"got ' ' for the question, expected a column's name"),
    ],
)
def test_columns_that_say_nothing_are_refused(columns, said):
    with pytest.raises(ValueError, match=said):
        ReadOptions(columns=columns)


def test_usual_columns_are_taken_where_they_are(tmp_path):
    usual = ReadOptions(("billing", "technical"), usual_columns=COLUMNS)
    own = read_rows(tickets(tmp_path), usual)
    row = {"question": "no invoice", "context": "dear all", "label": "billing"}
    known = read_rows(lines(tmp_path, row), usual)
    assert own[0].content == known[0].content
    assert own[0].answer == known[0].answer == 0
    swapped = tickets(tmp_path, "swapped.csv", [("a", "b")], ("body", "ticket subject"))
    found = sort_rows(swapped, ReadOptions(("x", "y"), (), None, {"question": "body"}, COLUMNS))
    assert found.questions[0].question == "a"
    assert found.questions[0].context == ""


def test_classes_are_the_different_answers_in_order(tmp_path):
    reading = ReadOptions(columns=COLUMNS, from_answers=True)
    found = read_rows(tickets(tmp_path), reading)
    assert {row.options for row in found} == {("billing", "technical")}
    assert [row.answer for row in found] == [0, 1, 0, 1]
    numbers = lines(tmp_path, *({"text": "a", "label": n} for n in (10, 2, 1.0, 2)))
    found = read_rows(numbers, ReadOptions(from_answers=True))
    assert found[0].options == ("1", "2", "10")
    assert [row.answer for row in found] == [2, 1, 0, 1]  # not indices
    truths = lines(tmp_path, *({"text": "a", "label": n} for n in (True, False)))
    assert [row.answer for row in read_rows(truths, ReadOptions(from_answers=True))] == [1, 0]
    words = lines(tmp_path, *({"text": "a", "label": n} for n in ("None", "nan", "None")))
    assert read_rows(words, ReadOptions(from_answers=True))[0].options == ("None", "nan")
    with pytest.raises(ValueError, match="no options; give a column 'options'"):
        load_rows(numbers)


def test_answers_that_are_no_classes_are_refused(tmp_path):
    reading = ReadOptions(from_answers=True)
    alike = lines(tmp_path, *({"text": "a", "label": "x"} for _ in range(3)))
    with pytest.raises(ValueError, match="all have the same answer 'x'; expected two or more"):
        read_rows(alike, reading)
    free = lines(tmp_path, *({"text": "a", "label": f"text {n}"} for n in range(40)))
    with pytest.raises(ValueError, match="40 rows have 40 different answers; expected classes"):
        read_rows(free, reading)
    indices = lines(tmp_path, *({"text": "a", "label": n} for n in (0, 1)))
    with pytest.raises(ValueError, match="answers that are the index of an option each"):
        read_rows(indices, ReadOptions(from_answers=True, answer_is="index"))
    empty = lines(tmp_path, {"text": "a", "label": "x"}, {"text": "b"}, {"text": "c", "label": "y"})
    with pytest.raises(ValueError, match="own.jsonl:2: no column 'answer'"):
        read_rows(empty, reading)


def test_messages_are_a_question_its_turns_and_perhaps_its_answer(tmp_path):
    talk = [
        {"role": "system", "content": "sort"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "no invoice"},
    ]
    answered = [*talk, {"role": "assistant", "content": "billing"}]
    path = lines(tmp_path, {"messages": answered}, {"messages": json.dumps(talk), "label": "other"})
    first, second = load_rows(path, ("billing", "other"))
    assert first.turns == (("system", "sort"), ("user", "hi"), ("assistant", "hello"))
    assert first.question == second.question == "no invoice"
    assert (first.answer, second.answer) == (0, 1)
    assert first.content == second.content
    named = lines(tmp_path, {"talk": talk, "label": "other", "message": "a column of its own"})
    (row,) = load_rows(named, ("billing", "other"), columns={"messages": "talk"})
    assert row.turns == first.turns


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [{"role": "user", "content": "a"}], "question": "b"}, "and a question"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}]},
            "got an answer beside messages",
        ),
        ({"messages": [{"role": "assistant", "content": "x"}]}, r"messages by \[\], expected"),
        ({"messages": [{"role": "system", "content": "x"}]}, r"messages by \['system'\]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "with a role among"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, 'content": a text'),
        ({"messages": "[1"}, "expected a JSON list .*write them as JSON"),
        ({"messages": {"role": "user"}}, "expected a list; write one"),
    ],
)
def test_what_is_no_conversation_is_refused(tmp_path, row, said):
    with pytest.raises(ValueError, match=f"row own.jsonl:1: .*{said}"):
        load_rows(lines(tmp_path, {**row, "answer": "x"}), ("x", "y"))


@pytest.mark.parametrize(
    ("answers", "got"),
    [
        (["yes", "Yes", "no", "yes"], r"'yes' \(2 rows\), 'Yes' \(1 rows\)"),
        (["not  so", "so", "not so"], r"'not  so' \(1 rows\), 'not so' \(1 rows\)"),
        (["Cafe\u0301", "the", "Caf\u00e9"], "'Caf"),
    ],
)
def test_a_class_in_two_spellings_is_not_two_classes(tmp_path, answers, got):
    rows = [{"text": f"row {i}", "label": answer} for i, answer in enumerate(answers)]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=rf"differ in case, spaces or a .0 alone: got {got}"):
        read_rows(path, ReadOptions(from_answers=True))


def test_options_settle_the_spelling_of_classes(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text("text,label\na,yes\nb,Yes\nc,NO\n")
    found = read_rows(path, ReadOptions(("no", "yes"), from_answers=True))
    assert [row.options[row.answer] for row in found] == ["yes", "yes", "no"]


def test_it_is_said_that_1_is_a_no_where_the_yes_comes_first(tmp_path, caplog):
    path = tmp_path / "own.csv"
    path.write_text("text,label\na,1\nb,0\n")
    assert [row.answer for row in load_rows(path, ("no", "yes"))] == [1, 0]
    assert not caplog.text
    assert [row.answer for row in load_rows(path, ("yes", "no"))] == [1, 0]
    assert "0 is 'yes' and 1 is 'no'; if 1 means 'yes', put 'no' first" in caplog.text
    caplog.clear()
    load_rows(path, ("yes", "no"), answer_is="index")
    assert not caplog.text
