"""The rows beside records: read, matched between runs, turned into tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bayestune.metrics import Bins, Row, summarise
from bayestune.whole_files import read_json_lines

Record = Mapping[str, Any]
Pair = tuple[Sequence[Row], Sequence[Row]]  # the rows of two methods in one run


def read_rows(record: Record, folder: str | Path) -> list[Row]:
    """The rows in the file of `folder` that a record names, perhaps gzipped; none without it."""
    path = Path(folder, record.get("predictions") or "")
    for file in (path, path.with_name(f"{path.name}.gz")):
        if file.is_file():
            return list(read_json_lines(file))
    return []


def renewed(records: Sequence[Record], folder: str | Path) -> list[Record]:
    """Computes the metrics of records of older versions anew, from their rows in `folder`.

    Such records have no `ece_if_calibrated`. Without their rows they stay as they are.
    """
    up_to_date = []
    for record in records:
        is_old = "ece_if_calibrated" not in record.get("metrics", {})
        rows = read_rows(record, folder) if is_old else []
        up_to_date.append({**record, "metrics": _metrics(record, rows)} if rows else record)
    return up_to_date


def _metrics(record: Record, rows: Sequence[Row]) -> dict[str, Any]:
    bins = Bins(record.get("bins", 15), record.get("binning", "torchmetrics"))
    written = [row.get("nll") for row in rows]  # older versions did not write it
    losses = None if None in written else torch.tensor(written, dtype=torch.float64)
    summary = summarise(*tensors(rows), bins, losses=losses)
    return {key: asdict(interval) for key, interval in summary.items()}


def tensors(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Probabilities (N, C) and answers (N,); rows of fewer options than C are padded with 0."""
    listed = [torch.tensor(row["probabilities"], dtype=torch.float64) for row in rows]
    answers = torch.tensor([row["answer"] for row in rows])
    return pad_sequence(listed, batch_first=True), answers


def paired_tensors(pairs: Sequence[Pair]) -> tuple[Tensor, Tensor, Tensor] | None:
    """K pairs of runs on the rows that all of them have: those of the same id, texts and answer.

    Ids alone do not tell rows apart: one made from a row's place in a file is another row's in
    another file, or in the same one after rows were inserted. Where some runs keep no texts, id and
    answer alone count.

    Returns:
        Probabilities (K, N, C) of the first and of the second of each pair, and answers (N,), in
        the order of the first run; None without such rows.
    """
    runs = list(chain(*pairs))
    texts = common_texts(runs)
    keyed = []
    for rows in runs:
        keyed.append({row_key(row, texts): row for row in rows})
    shared = set(keyed[0]).intersection(*keyed) if keyed else set()
    if not shared:
        return None
    order = [key for key in keyed[0] if key in shared]
    aligned = []
    for rows in keyed:
        aligned.append(tensors([rows[key] for key in order]))
    probabilities = torch.stack([of_run for of_run, _ in aligned])
    answers = aligned[0][1]  # those of all runs
    return probabilities[::2], probabilities[1::2], answers


def common_texts(runs: Sequence[Sequence[Row]]) -> tuple[str, ...]:
    """Names of the texts that all rows of all runs keep, which tell rows apart beside their ids."""
    common = {"question", "options"}
    for row in chain(*runs):
        common &= row.keys()
    return tuple(sorted(common))


def row_key(row: Row, texts: Sequence[str]) -> tuple[Any, ...]:
    """Id, answer and texts: rows of two runs are the same row if these are equal."""
    return (row["id"], row["answer"], *(str(row[name]) for name in texts))
