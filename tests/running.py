"""Rows of one's own, and commands over them on a tiny model."""

import json
import os
from pathlib import Path

from bayestune.cli import main

COLOURS = ("red", "green", "blue", "the sky")


def environment(**more):
    """That of a process on one thread, which imports what lies beside the tests as they do."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return {**os.environ, **own, **more}


def own_rows(count, start=0, **more):
    rows = []
    for i in range(start, start + count):
        options = COLOURS[: 3 + i % 2]
        row = {"question": f"what is {COLOURS[i % 4]} ({i})?", "options": options}
        rows.append({**row, "answer": i % len(options), **more})
    return rows


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def furnish(folder, model, tokenizer):
    """A folder with a model and rows."""
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_rows(folder / "train.jsonl", own_rows(8))
    write_rows(folder / "test.jsonl", own_rows(5, start=3))
    write_rows(folder / "ask.jsonl", own_rows(7))
    return folder


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def fitting(place, command="fit", output="out", **options):
    """The arguments of a short fit."""
    given = {
        "model": place / "model",
        "data": place / "train.jsonl",
        "output": place / output,
        "steps": 3,
        "batch_size": 2,
        "progress": "false",
        "lora.rank": 2,
        **options,
    }
    return [command, *(f"--{name}={value}" for name, value in given.items())]


def run(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


def predicted(place, *options, posterior="out"):
    """What `predict` answers to the rows of ask.jsonl."""
    answers = place / "answers.jsonl"
    reading = (f"--posterior={place / posterior}", f"--input={place / 'ask.jsonl'}")
    run("predict", *reading, *options, f"--output={answers}", "--overwrite")
    return read_rows(answers)


def probabilities(rows):
    return [p for row in rows for p in row["probabilities"]]


def failed(arguments, capsys):
    """The one line that a command which must fail says."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.split("\n") if line.startswith("bayestune: error: ")]
    assert len(lines) == 1
    assert captured.err.endswith(f"{lines[0]}\n")
    assert captured.out == ""
    return lines[0]
