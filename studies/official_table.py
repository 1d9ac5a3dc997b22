"""What `official_results` found, as a table: figures of each arm, and theirs − ours by row."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayestune.metrics import calibrated_level, paired_bootstrap
from bayestune.whole_files import read_json_lines

UNITS = {"nll": (1, 3), "ece": (100, 1), "accuracy": (100, 1), "brier": (1, 3)}
NAMES = {"nll": "NLL", "ece": "ECE %", "accuracy": "ACC %", "brier": "Brier"}
COMPARED = ("nll", "accuracy")
OURS = ("ours in its manner", "ours as in the grid")
Record = dict[str, Any]
Line = tuple[str, int]  # an arm, a number of draws


def table(folder: Path) -> str:
    """The table of all records of a folder."""
    by_line: dict[Line, dict[int, Record]] = {}
    for record in read_json_lines(folder / "records.jsonl"):
        by_line.setdefault((record["arm"], record["draws"]), {})[record["seed"]] = record
    kept = {line: rows_of(folder, seeds) for line, seeds in by_line.items()}
    first = next(iter(next(iter(by_line.values())).values()))
    labels = next(iter(next(iter(kept.values())).values()))[1]
    chance = math.log(next(iter(next(iter(kept.values())).values()))[0].shape[1])
    about = (
        f"{first['task']}, {first['model']}, {first['train_rows']} rows, {first['steps']} steps, "
        f"{first['n']} evaluation rows; the authors' code is {first['checkout'][:7]}. Chance has "
        f"an NLL of {chance:.3f}. Means over the seeds."
    )
    compared = "Theirs − ours on the same rows and seeds, with the paired bootstrap over rows:"
    parts = [about, _figures(by_line, kept), compared, _differences(kept, labels)]
    return "\n\n".join(parts) + "\n"


def rows_of(folder: Path, seeds: Mapping[int, Record]) -> dict[int, tuple[Tensor, Tensor]]:
    """Each seed's probabilities (N, C) and answers (N,)."""
    found = {}
    for seed, record in sorted(seeds.items()):
        rows = read_json_lines(folder / record["rows"])
        probabilities = torch.tensor([row["probabilities"] for row in rows], dtype=torch.float64)
        found[seed] = (probabilities, torch.tensor([row["answer"] for row in rows]))
    return found


def _figures(
    by_line: Mapping[Line, Mapping[int, Record]],
    kept: Mapping[Line, Mapping[int, tuple[Tensor, Tensor]]],
) -> str:
    lines = [
        f"| | N | seeds | {' | '.join(NAMES.values())} | ECE % if calibrated |",
        "|---|" + "---|" * 7,
    ]
    for (arm, draws), seeds in by_line.items():
        cells = [arm, str(draws), ", ".join(map(str, sorted(seeds)))]
        for name, (unit, digits) in UNITS.items():
            values = [unit * record["figures"][name] for record in seeds.values()]
            cells.append(f"{sum(values) / len(values):.{digits}f}")
        levels = [100 * calibrated_level(*rows).value for rows in kept[arm, draws].values()]
        cells.append(f"{sum(levels) / len(levels):.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _differences(kept: Mapping[Line, Mapping[int, tuple[Tensor, Tensor]]], labels: Tensor) -> str:
    lines = ["| theirs − | N | seeds | NLL | ACC |", "|---|---|---|---|---|"]
    for (arm, draws), theirs in kept.items():
        method, _, whose = arm.partition(", ")
        for other in OURS if whose == "theirs" else ():
            ours = kept.get((f"{method}, {other}", draws), {})
            seeds = sorted(set(theirs) & set(ours))
            if not seeds:
                continue
            both = [_stacked(one, seeds) for one in (theirs, ours)]
            cells = [f"{method}, {other}", str(draws), ", ".join(map(str, seeds))]
            for metric in COMPARED:
                found = paired_bootstrap(both[0], both[1], labels, metric)
                interval = f"[{found.low:+.3f}, {found.high:+.3f}]"
                cells.append(f"{found.difference:+.3f} {interval}, p {found.p_value:.3f}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _stacked(runs: Mapping[int, tuple[Tensor, Tensor]], seeds: Sequence[int]) -> Tensor:
    """The probabilities (K, N, C) of K seeds."""
    return torch.stack([runs[seed][0] for seed in seeds])
