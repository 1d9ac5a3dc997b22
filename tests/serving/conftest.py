"""A tiny calibrated posterior, and a client of its service."""

import random

import pytest
from clients import serving

from running import fitting, furnish, read_rows, run, write_rows
from tiny import byte_level_tokenizer, tiny_llama

COLOURS = ("red", "green", "I do not know")
NOISY = {"learning_rate": 0.1, "blob.init_root_std": 0.7, "blob.prior_std": 1.0}


def labelled(count, start=0):
    generator = random.Random(start)
    rows = []
    for i in range(start, start + count):
        options = COLOURS[: 2 + i % 2]
        text = f"what is {'the ' * (i % 5)}number {i}?"
        rows.append({"question": text, "options": options, "answer": generator.randrange(2)})
    return rows


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """Folders "blob", calibrated, and "mle", which is not, on one base; rows new.jsonl."""
    folder = tmp_path_factory.mktemp("serving")
    furnish(folder, tiny_llama(initializer_range=0.3), byte_level_tokenizer())
    write_rows(folder / "train.jsonl", labelled(8))
    run(*fitting(folder, output="blob", **NOISY))
    run(*fitting(folder, output="mle", method="mle"))
    asked = write_rows(folder / "held_out.jsonl", labelled(80, 100))
    write_rows(folder / "new.jsonl", labelled(40, 300))
    said = folder / "said.jsonl"
    given = [f"--posterior={folder / 'blob'}", f"--input={asked}", f"--output={said}"]
    run("predict", *given, "--draws=3")
    rows = []
    for i, line in enumerate(read_rows(said)):
        answer = (line["choice"] + (i % 16 == 0)) % len(line["options"])
        rows.append({**{k: line[k] for k in ("question", "options")}, "answer": answer})
    write_rows(asked, rows)
    easy = (
        "--risk=0.3",
        "--confidence=0.8",
        "--draws=[3]",
        "--factors=[]",
        "--unsure=i do not know",
    )
    run("calibrate", folder / "blob", f"--rows={asked}", *easy)
    return folder


@pytest.fixture(scope="session")
def new(place):
    """Rows to ask, without answers."""
    rows = read_rows(place / "new.jsonl")
    return [{"question": row["question"], "options": row["options"]} for row in rows]


@pytest.fixture(scope="module")
def client(place):
    with serving([place / "blob", place / "mle"]) as found:
        yield found
