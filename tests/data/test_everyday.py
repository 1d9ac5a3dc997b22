"""The embedded everyday questions: shape, balance, duplicates and style."""

import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from bayestune.whole_files import read_json_lines

ROOT = Path(__file__).parents[2] / "src/bayestune/data/everyday/default"
SIZES = {"train": 240, "validation": 120, "test": 360}
SPLITS = {split: read_json_lines(ROOT / f"{split}.jsonl") for split in SIZES}
ROWS = [row for rows in SPLITS.values() for row in rows]
TOPICS = {row["topic"] for row in ROWS}


def plain(text):
    """The words of a text between spaces."""
    return " ".join(["", *re.findall(r"\w+", text.casefold()), ""])


def right(row):
    return row["options"][row["answer"]]


@pytest.mark.parametrize("split", SIZES)
def test_splits_are_plain_files_of_balanced_answers_and_topics(split):
    raw = (ROOT / f"{split}.jsonl").read_bytes()
    assert raw.endswith(b"}\n")
    assert not re.search(rb"\r|\n\n", raw)
    rows = SPLITS[split]
    assert len(rows) == SIZES[split]
    answers = Counter(row["answer"] for row in rows)
    topics = Counter(row["topic"] for row in rows)
    assert set(answers) == set(range(4))
    assert set(topics) == TOPICS
    assert len(TOPICS) == 12
    for counts in (answers, topics):
        assert max(counts.values()) - min(counts.values()) <= 1


def test_columns_and_style():
    for row in ROWS:
        assert list(row) == ["id", "topic", "question", "options", "answer"]
        assert re.fullmatch(row["topic"].replace(" ", "-") + r"-\d{3}", row["id"])
        assert type(row["answer"]) is int
        assert row["answer"] in range(4)
        assert len({plain(option) for option in row["options"]}) == len(row["options"]) == 4
        assert re.fullmatch(r"[A-Z].*\?", row["question"])
        assert plain(right(row)) not in plain(row["question"])
        for text in (row["question"], *row["options"]):
            assert text == " ".join(text.split())
        for option in row["options"]:
            assert not option.endswith((".", "?", "!", ","))
            assert not option.casefold().startswith(("all of", "none of"))
            assert 1 <= len(option.split()) <= 8


def test_no_duplicates():
    assert len({row["id"] for row in ROWS}) == len(ROWS)
    assert len({plain(row["question"]) for row in ROWS}) == len(ROWS)
    words = [(row["id"], set(plain(row["question"] + " " + right(row)).split())) for row in ROWS]
    pairs = combinations(words, 2)
    assert not [(a, b) for (a, x), (b, y) in pairs if len(x & y) > 0.8 * len(x | y)]


def test_length_does_not_give_the_answer_away():
    ranks = Counter()
    for row in ROWS:
        others = [len(option) for i, option in enumerate(row["options"]) if i != row["answer"]]
        ranks["longest"] += len(right(row)) > max(others)
        ranks["shortest"] += len(right(row)) < min(others)
    assert all(0.1 < count / len(ROWS) < 0.42 for count in ranks.values())
