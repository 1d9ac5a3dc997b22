"""Rows' logits, and the scores that are known beside those of the logits."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from bayestune.data import Question
from bayestune.decisions import Calibration, Distance, NotFiniteLogits
from bayestune.evaluation import error_row
from bayestune.runtime import shared_work
from bayestune.scoring import Encoded, Scorer
from bayestune.session.fit import Fit
from bayestune.session.prediction_options import BATCH, PredictionOptions, joined

PROMPT_LENGTH = "prompt_length"  # the score that every artefact has for nothing
DISTANCE = "distance"  # of the calibrations that saw training rows
T = TypeVar("T")
WINDOW = 32  # rows that are predicted before their lines are written


@dataclass(frozen=True, eq=False)
class RowOutputs:
    """What a model says of N rows.

    Args:
        logits: (S, N, C).
        extra: scores beside those of the logits, by name, (N,) each.
    """

    logits: Tensor
    extra: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class RowPredictor:
    """What predicts and how, and the training rows' activations if distances are asked for."""

    fit: Fit
    way: PredictionOptions
    scorer: Scorer
    reference: Distance | None = None

    def at(self, rows: Sequence[Question]) -> RowOutputs:
        """Some rows at once."""
        return self.at_encoded(self.scorer.encode(rows))

    def at_encoded(self, encoded: Sequence[Encoded], batch_size: int = BATCH) -> RowOutputs:
        """The same of encoded rows, so many in a pass."""
        extra = prompt_lengths(encoded)
        asked = (self.fit, self.scorer, encoded, batch_size)
        if self.reference is None:
            return RowOutputs(self.way.passed(*asked), extra)
        logits, activations = self.way.watched(*asked)
        return RowOutputs(logits, extra | {DISTANCE: self.reference.of(activations)})

    def over(self, rows: Sequence[Question], *, shared: bool = False) -> RowOutputs:
        """Any number of rows, a window at a time, as predictions take them.

        With `shared`, processes that run the same command take some of the windows each.
        """
        parts = windows(rows)
        found = shared_work(parts, self.at) if shared else [self.at(part) for part in parts]
        extra = columns_joined([outputs.extra for outputs in found])
        return RowOutputs(joined([outputs.logits for outputs in found]), extra)

    def activations(self, rows: Sequence[Question], *, shared: bool = False) -> dict[str, Tensor]:
        """A x (N, r) by slot name, of the mean; `shared` as in `over`."""
        mean = PredictionOptions(0, self.way.draw_seed, self.way.bf16)

        def of(part: Sequence[Question]) -> Mapping[str, Tensor]:
            return mean.watched(self.fit, self.scorer, self.scorer.encode(part))[1]

        parts = windows(rows)
        return columns_joined(shared_work(parts, of) if shared else list(map(of, parts)))


def columns_joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Columns of some rows each as those of all, by the names that every part has."""
    found = {}
    for name in parts[0]:
        own = [part[name] for part in parts if name in part]
        if len(own) == len(parts):
            found[name] = torch.cat(own)
    return found


def windows(rows: Sequence[T]) -> list[Sequence[T]]:
    """The rows, so many at a time as predictions take them."""
    return [rows[start : start + WINDOW] for start in range(0, len(rows), WINDOW)]


def prompt_lengths(encoded: Sequence[Encoded]) -> dict[str, Tensor]:
    """The score that costs nothing."""
    lengths = [float(row["length"]) for row in encoded]
    return {PROMPT_LENGTH: torch.tensor(lengths, dtype=torch.float64)}


def kept_reference(calibration: Calibration | None) -> Distance | None:
    """What a calibration keeps of the training rows' activations, if it saw them."""
    texts: Any = calibration.settings.get(DISTANCE) if calibration else None
    return Distance.from_json(texts) if texts else None


def own_reference(calibration: Calibration | None) -> Distance | None:
    """The same in the artefact itself: a student's activations are another adapter's."""
    if calibration is None or PredictionOptions.of(calibration.settings).student is not None:
        return None
    return kept_reference(calibration)


def lines_or_errors(
    rows: Sequence[Question], tell: Callable[[Sequence[Question]], Iterable[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """The lines that `tell` makes of rows; where logits are no numbers, of each row by itself."""
    try:
        return list(tell(rows)) if rows else []
    except NotFiniteLogits as problem:
        if len(rows) == 1:
            return [error_row(rows[0], problem)]
    lines = []
    for row in rows:
        lines += lines_or_errors([row], tell)
    return lines
