"""Classes that are numbers, and files where one bad answer or a tenth option stands."""

import csv
import string

import pytest

from bayestune.data import ReadOptions, load_rows, read_rows, sort_rows
from bayestune.session import TaskOptions, read_options_of_fit
from running import write_rows


def rated(path, labels):
    return write_rows(
        path, [{"text": f"row {i}", "label": label} for i, label in enumerate(labels)]
    )


def chosen(rows):
    return [row.options[row.answer] for row in rows]


@pytest.mark.parametrize(
    ("train", "test"),
    [((1, 2, 3), (1, 2)), ((-1, 0, 1), (0, 1)), ((0, 1, 2, 3), (2, 3)), ((1.0, 2.0), (2.0, 1.0))],
)
def test_other_files_name_the_classes_that_training_rows_named(tmp_path, train, test):
    data = rated(tmp_path / "train.jsonl", train * 3)
    task = TaskOptions(data=data, evaluation_data=rated(tmp_path / "test.jsonl", test)).load()
    expected = [f"{label:g}" for label in test]
    assert chosen(task.evaluation) == expected
    told = {"options": task.shared_options, "answer_is": task.answer_is}
    reading = read_options_of_fit({"questions": told})
    assert chosen(read_rows(tmp_path / "test.jsonl", reading)) == expected
    assert chosen(sort_rows(tmp_path / "test.jsonl", reading).questions) == expected


def test_a_number_that_is_no_class_is_no_index(tmp_path):
    options = TaskOptions(
        data=rated(tmp_path / "train.jsonl", (1, 2, 3) * 3),
        evaluation_data=rated(tmp_path / "test.jsonl", (0, 1, 2)),
    )
    with pytest.raises(ValueError, match="the right answer 0 is not among its options"):
        options.load()


def test_a_reading_of_the_fit_yields_to_a_file_that_it_does_not_fit(tmp_path):
    reading = ReadOptions(("yes", "no"), usual_answer_is="text")
    path = rated(tmp_path / "test.jsonl", (1, 0))
    assert chosen(read_rows(path, reading)) == ["no", "yes"]


def test_one_bad_answer_spoils_no_other(tmp_path):
    path = tmp_path / "rated.csv"
    answers = [*"1234512345", "n/a"]
    with path.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file)
        lines.writerow(["text", "options", "label"])
        lines.writerows([f"row {i}", "1|2|3|4|5", answer] for i, answer in enumerate(answers))
    found = sort_rows(path, ReadOptions())
    assert chosen(found.questions) == answers[:10]
    assert list(found.problems) == [10]


@pytest.mark.parametrize("mark", [str, lambda i: string.ascii_lowercase[i - 1], "{:02d}".format])
def test_more_than_ten_columns_of_options(tmp_path, mark):
    cells = {f"option_{mark(i)}": f"text {i}" for i in range(1, 13)}
    path = write_rows(
        tmp_path / "own.jsonl", [{"question": "which?", **cells, "answer": "text 12"}]
    )
    (row,) = load_rows(path)
    assert row.options == tuple(f"text {i}" for i in range(1, 13))
    assert row.answer == 11


def test_a_column_of_another_letter_is_no_option(tmp_path):
    row = {"question": "which?", "a": "one", "b": "two", "x": "0.3", "answer": "b"}
    (found,) = load_rows(write_rows(tmp_path / "own.jsonl", [row]))
    assert found.options == ("one", "two")


@pytest.mark.parametrize("labels", [(1, 2, 3, 4), (1.0, 2.0), ("1.0", "2.0"), ("1", "2")])
def test_numbers_that_are_options_and_indices_of_others(tmp_path, labels):
    path = rated(tmp_path / "own.jsonl", labels)
    stars = ("1", "2", "3", "4", "5")
    with pytest.raises(ValueError, match=r"can be read in two ways: got .* give answer_is"):
        load_rows(path, stars)
    assert chosen(load_rows(path, stars, answer_is="text")) == [f"{float(i):g}" for i in labels]
    if not isinstance(labels[0], str):
        assert [row.answer for row in load_rows(path, stars, answer_is="index")] == [*labels]


def test_numbers_that_are_the_same_option_in_both_readings(tmp_path):
    path = rated(tmp_path / "own.jsonl", (0, 1, 1))
    assert chosen(load_rows(path, ("0", "1"))) == ["0", "1", "1"]


def test_a_class_in_two_spellings_of_a_number(tmp_path):
    data = rated(tmp_path / "own.jsonl", ("1.0", "1", "2", "2"))
    with pytest.raises(ValueError, match=r"a \.0 alone: got '1.0' \(1 rows\), '1' \(1 rows\)"):
        TaskOptions(data=data).load()


def test_a_class_that_is_how_a_missing_value_is_written(tmp_path, caplog):
    TaskOptions(data=rated(tmp_path / "own.jsonl", ("nan", "good", "bad", "nan"))).load()
    assert "2 rows have the answer 'nan', which is how a missing value is written" in caplog.text


def test_a_key_twice_in_an_array_of_rows(tmp_path):
    path = tmp_path / "own.json"
    path.write_text('[{"question": "a", "question": "b", "options": ["x", "y"], "answer": "x"}]')
    with pytest.raises(ValueError, match=r"got \['question'\] more than once"):
        load_rows(path)
