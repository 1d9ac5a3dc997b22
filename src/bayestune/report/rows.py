"""The rows beside a record: read, matched between runs, turned into tensors."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from bayestune.metrics import Row

Record = Mapping[str, Any]


def read_rows(record: Record, folder: str | Path) -> list[Row]:
    """The rows that a record's metrics were computed from; none if their file is missing.

    Args:
        record: names the file under "predictions".
        folder: where it is.
    """
    path = Path(folder) / str(record.get("predictions") or "predictions missing")
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    return [json.loads(line) for line in lines if line.strip()]


def tensors(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Probabilities (N, C) and answers (N,); rows of fewer options than C are padded with 0.

    >>> tensors([{"probabilities": [1.0], "answer": 0}, {"probabilities": [0.5, 0.5], "answer": 1}])
    (tensor([[1.0000, 0.0000],
            [0.5000, 0.5000]], dtype=torch.float64), tensor([0, 1]))
    """
    listed = [torch.tensor(row["probabilities"], dtype=torch.float64) for row in rows]
    width = max(map(len, listed))
    padded = torch.stack([pad(one, (0, width - len(one))) for one in listed])
    return padded, torch.tensor([row["answer"] for row in rows])


def paired_tensors(
    pairs: Sequence[tuple[Sequence[Row], Sequence[Row]]],
) -> tuple[Tensor, Tensor, Tensor] | None:
    """K pairs of runs on the rows that all of them have: those of the same id and answer.

    Args:
        pairs: the rows of two methods in each run.

    Returns:
        Probabilities (K, N, C) of the first and of the second method, and answers (N,), in the
        order of the first run; None without such rows.
    """
    keyed = [_by_question(rows) for pair in pairs for rows in pair]
    shared = set(keyed[0]).intersection(*keyed) if keyed else set()
    if not shared:
        return None
    order = [key for key in keyed[0] if key in shared]
    runs = [tensors(list(map(rows.__getitem__, order))) for rows in keyed]
    probabilities = torch.stack([run for run, _ in runs])
    return probabilities[::2], probabilities[1::2], runs[0][1]


def _by_question(rows: Sequence[Row]) -> dict[tuple[Any, Any], Row]:
    return {(row["id"], row["answer"]): row for row in rows}
