"""Which differences between methods are more than the luck of the questions: paired bootstrap against the best."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from bayestune.metrics import paired_bootstrap
from bayestune.report.rows import read_rows

Record = Mapping[str, Any]
Row = Mapping[str, Any]
METRICS = ("nll", "brier", "accuracy")


def significance(
    records: Sequence[Record],
    folder: str | Path,
    metrics: Sequence[str] = METRICS,
    *,
    resamples: int = 1000,
    against: str | None = None,
) -> list[dict[str, Any]]:
    """Each method against one of them, that of least mean NLL by default, on the same questions of one task.

    For a seed that both methods have, d_i is the difference of a question's losses; averaged over those seeds it is
    one number a question, and the questions are resampled. So p is the chance of a difference this large among other
    questions if there were none, for these very fits: seeds are held, and p is not corrected for the choice of the
    best or for the number of methods.

    Args:
        records: of one task, model, and way of scoring.
        folder: where their files of rows are.
        metrics: keys of `bayestune.metrics.summarise`.
        resamples: of the bootstrap.
        against: the label of the method to compare with; None for that of least mean NLL.

    Returns:
        JSON-able: for each method but that one, in order of appearance, `label`, `against`, the `seeds` compared, and
        for each metric difference (method less that one), low, high, p_value and n. Methods without a seed, rows or
        questions in common with it are left out; all are, where it has no record.

    Reference:
        Davison, Hinkley (1997), ch. 4, https://doi.org/10.1017/CBO9780511802843
    """
    runs = by_seed(records)
    means = {
        label: mean
        for label, seeds in runs.items()
        if (mean := _mean_nll(seeds.values())) is not None
    }
    best = min(means, key=means.__getitem__, default=None) if against is None else against
    compared = []
    for label in runs:
        if best not in runs or label == best:
            continue
        shared = [seed for seed in runs[best] if seed in runs[label]]
        pairs = {
            seed: tuple(read_rows(runs[name][seed], folder) for name in (label, best))
            for seed in shared
        }
        pairs = {seed: pair for seed, pair in pairs.items() if all(pair)}
        tensors = _paired(list(pairs.values()))
        if tensors is not None:
            differences = {
                metric: asdict(paired_bootstrap(*tensors, metric, resamples)) for metric in metrics
            }
            compared.append({"label": label, "against": best, "seeds": list(pairs), **differences})
    return compared


def by_seed(records: Iterable[Record]) -> dict[str, dict[Any, Record]]:
    """The records of each method by seed; of two of the same seed the later one."""
    runs: dict[str, dict[Any, Record]] = {}
    for record in records:
        runs.setdefault(str(record.get("label", record.get("method"))), {})[record.get("seed")] = (
            record
        )
    return runs


def value_of(record: Record, metric: str) -> float | None:
    """A metric's value in a record; None if it has none."""
    return (record.get("metrics", {}).get(metric) or {}).get("value")


def _mean_nll(records: Iterable[Record]) -> float | None:
    values = [value for record in records if (value := value_of(record, "nll")) is not None]
    return sum(values) / len(values) if values else None


def _paired(runs: Sequence[tuple[Sequence[Row], ...]]) -> tuple[Tensor, Tensor, Tensor] | None:
    """Probabilities (K, N, C) of both methods in K runs on the questions that all of them have, and labels (N,)."""
    keyed = [[{row["id"]: row for row in rows} for rows in pair] for pair in runs]
    everywhere = [
        key
        for key in (keyed[0][0] if keyed else {})
        if all(key in rows for pair in keyed for rows in pair)
    ]
    if not everywhere:
        return None
    first, second = (
        torch.stack([_probabilities([pair[i][key] for key in everywhere]) for pair in keyed])
        for i in (0, 1)
    )
    return first, second, torch.tensor([keyed[0][0][key]["answer"] for key in everywhere])


def _probabilities(rows: Sequence[Row]) -> Tensor:
    width = max(len(row["probabilities"]) for row in rows)
    return torch.stack(
        [
            pad(
                torch.tensor(row["probabilities"], dtype=torch.float64),
                (0, width - len(row["probabilities"])),
            )
            for row in rows
        ]
    )
