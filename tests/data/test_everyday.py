"""Checks of the embedded everyday question set: shape, balance, duplicates and style."""

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2] / "src/bayestune/data/everyday/default"
SPLITS = ("train", "validation", "test")
KEYS = ["id", "topic", "question", "options", "answer"]

Row = dict[str, Any]


def load(split: str) -> list[Row]:
    return [
        json.loads(line)
        for line in (ROOT / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def right(row: Row) -> str:
    return row["options"][row["answer"]]


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Row]]:
    return {split: load(split) for split in SPLITS}


@pytest.fixture(scope="module")
def rows(splits: dict[str, list[Row]]) -> list[Row]:
    return [row for split in SPLITS for row in splits[split]]


@pytest.mark.parametrize("split", SPLITS)
def test_files_are_plain_json_lines(split: str) -> None:
    raw = (ROOT / f"{split}.jsonl").read_bytes()
    assert raw.endswith(b"}\n")
    assert b"\r" not in raw
    assert b"\n\n" not in raw


def test_sizes(splits: dict[str, list[Row]], rows: list[Row]) -> None:
    assert len(rows) >= 600
    assert {split: len(part) for split, part in splits.items()} == {
        "train": 240,
        "validation": 120,
        "test": 360,
    }


def test_columns(rows: list[Row]) -> None:
    for row in rows:
        assert list(row) == KEYS
        assert all(isinstance(row[key], str) and row[key] for key in ("id", "topic", "question"))
        assert all(isinstance(option, str) for option in row["options"])
        assert type(row["answer"]) is int


def test_options_are_four_and_distinct(rows: list[Row]) -> None:
    for row in rows:
        assert len(row["options"]) == 4, row["id"]
        assert len({" ".join(words(option)) for option in row["options"]}) == 4, row["id"]
        assert row["answer"] in range(4), row["id"]


def test_ids_are_unique_and_name_the_topic(rows: list[Row]) -> None:
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert re.fullmatch(row["topic"].replace(" ", "-") + r"-\d{3}", row["id"]), row["id"]


@pytest.mark.parametrize("split", SPLITS)
def test_answer_positions_are_balanced(splits: dict[str, list[Row]], split: str) -> None:
    counts = Counter(row["answer"] for row in splits[split])
    seen = [counts[position] for position in range(4)]
    assert max(seen) - min(seen) <= 1


@pytest.mark.parametrize("split", SPLITS)
def test_every_topic_is_in_every_split(
    splits: dict[str, list[Row]], rows: list[Row], split: str
) -> None:
    topics = {row["topic"] for row in rows}
    counts = Counter(row["topic"] for row in splits[split])
    assert len(topics) == 12
    assert set(counts) == topics
    assert max(counts.values()) - min(counts.values()) <= 1


def test_no_duplicate_question(rows: list[Row]) -> None:
    counts = Counter(" ".join(words(row["question"])) for row in rows)
    assert [question for question, count in counts.items() if count > 1] == []


def test_no_near_duplicates(rows: list[Row]) -> None:
    tokens = [(row["id"], set(words(f"{row['question']} {right(row)}"))) for row in rows]
    close = [
        (name_a, name_b)
        for (name_a, a), (name_b, b) in combinations(tokens, 2)
        if len(a & b) > 0.8 * len(a | b)
    ]
    assert close == []


def test_style(rows: list[Row]) -> None:
    for row in rows:
        assert row["question"].endswith("?"), row["id"]
        assert row["question"][0].isupper(), row["id"]
        for text in (row["question"], *row["options"]):
            assert text == " ".join(text.split()), row["id"]
        for option in row["options"]:
            assert not option.endswith((".", "?", "!", ",")), row["id"]
            assert 1 <= len(option.split()) <= 8, row["id"]
            assert not option.casefold().startswith(("all of", "none of")), row["id"]


def test_question_does_not_contain_the_answer(rows: list[Row]) -> None:
    for row in rows:
        answer, question = (" ".join(words(text)) for text in (right(row), row["question"]))
        assert f" {answer} " not in f" {question} ", row["id"]


def test_length_does_not_give_the_answer_away(rows: list[Row]) -> None:
    longest = shortest = 0
    for row in rows:
        others = [
            len(option) for index, option in enumerate(row["options"]) if index != row["answer"]
        ]
        longest += len(right(row)) > max(others)
        shortest += len(right(row)) < min(others)
    assert 0.1 < longest / len(rows) < 0.42
    assert 0.1 < shortest / len(rows) < 0.42
