"""A tiny model and a tiny data set on disk, as a user has them."""

import json
from pathlib import Path
from typing import Any

TEXTS = ["red", "green", "blue", "the sky"]


def write_model(folder: Path, model: Any, tokenizer: Any) -> Path:
    """Saves both in one folder, as `from_pretrained` reads them."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_lines(folder: Path, **splits: list[dict[str, Any]]) -> None:
    """Writes a JSONL file for each split."""
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")


def arc_rows(count: int, options: tuple[int, ...] = (4,)) -> list[dict[str, Any]]:
    """ARC's rows, of unlike length, with these numbers of options in turn."""
    rows = []
    for i in range(count):
        size = options[i % len(options)]
        choices = {"text": TEXTS[:size], "label": list("ABCD")[:size]}
        question = f"what is {'red and ' * (i % 3)}{i}?"
        answer = "ABCD"[i % size]
        rows.append({"id": str(i), "question": question, "choices": choices, "answerKey": answer})
    return rows


def write_arc(root: Path, train: int = 9, validation: int = 9, **how: Any) -> Path:
    """ARC-Easy under a data root."""
    splits = {"train": arc_rows(train, **how), "validation": arc_rows(validation, **how)}
    write_lines(root / "allenai/ai2_arc/ARC-Easy", **splits)
    return root
