"""Rows' logits, and beside them scores that logits do not give: prompt length and distance."""

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
from bayestune.session.prediction_options import BATCH, PredictionOptions, joined_logits

PROMPT_LENGTH = "prompt_length"  # the score that every artefact has for nothing
DISTANCE = "distance"  # the score of calibrations that were given the training rows
T = TypeVar("T")
WINDOW = 32  # rows that are predicted before their lines are written


@dataclass(frozen=True, eq=False)
class RowOutputs:
    """What one way of predicting gives for N rows.

    Args:
        logits: (S, N, C).
        extra: scores beside those of the logits, by name, (N,) each.
    """

    logits: Tensor
    extra: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class RowPredictor:
    """Predicts rows with a fit.

    Args:
        fit: what predicts.
        way: how: by the mean, by draws, by a cascade.
        scorer: encodes the rows.
        reference: gives rows' distances from the training rows; None for no distances.
    """

    fit: Fit
    way: PredictionOptions
    scorer: Scorer
    reference: Distance | None = None

    def at(self, rows: Sequence[Question]) -> RowOutputs:
        """The outputs of a few rows."""
        return self.at_encoded(self.scorer.encode(rows))

    def at_encoded(self, encoded: Sequence[Encoded], batch_size: int = BATCH) -> RowOutputs:
        """The outputs of encoded rows, `batch_size` of them in a pass."""
        extra = prompt_lengths(encoded)
        if self.reference is None:
            logits = self.way.passed(self.fit, self.scorer, encoded, batch_size)
            return RowOutputs(logits, extra)
        logits, activations = self.way.watched(self.fit, self.scorer, encoded, batch_size)
        return RowOutputs(logits, extra | {DISTANCE: self.reference.of(activations)})

    def over(self, rows: Sequence[Question], *, shared: bool = False) -> RowOutputs:
        """The outputs of any number of rows, a window at a time.

        With `shared`, the windows are divided among processes that run the same command.
        """
        parts = windows(rows)
        outputs = shared_work(parts, self.at) if shared else [self.at(part) for part in parts]
        extra = joined_columns([part.extra for part in outputs])
        return RowOutputs(joined_logits([part.logits for part in outputs]), extra)

    def activations(self, rows: Sequence[Question], *, shared: bool = False) -> dict[str, Tensor]:
        """A x (N, r) by slot name, of the mean; `shared` as in `over`."""
        mean = PredictionOptions(0, self.way.draw_seed, self.way.bf16)

        def activations_of(part: Sequence[Question]) -> Mapping[str, Tensor]:
            return mean.watched(self.fit, self.scorer, self.scorer.encode(part))[1]

        parts = windows(rows)
        of_parts = shared_work(parts, activations_of) if shared else map(activations_of, parts)
        return joined_columns(list(of_parts))


def joined_columns(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenates the columns of several lots of rows; a name that some lot lacks is left out.

    Args:
        parts: of each lot of rows, its columns by name, (n, …) each; at least one lot.
    """
    columns = {}
    for name in parts[0]:
        pieces = [part[name] for part in parts if name in part]
        if len(pieces) == len(parts):
            columns[name] = torch.cat(pieces)
    return columns


def windows(rows: Sequence[T]) -> list[Sequence[T]]:
    """The rows in windows of `WINDOW` of them, the last one perhaps shorter."""
    return [rows[start : start + WINDOW] for start in range(0, len(rows), WINDOW)]


def prompt_lengths(encoded: Sequence[Encoded]) -> dict[str, Tensor]:
    """Each row's number of tokens, (N,), under the name of that score."""
    lengths = [float(row["length"]) for row in encoded]
    return {PROMPT_LENGTH: torch.tensor(lengths, dtype=torch.float64)}


def kept_reference(calibration: Calibration | None) -> Distance | None:
    """The distance from the training rows that a calibration keeps; None if it has none."""
    texts: Any = calibration.settings.get(DISTANCE) if calibration else None
    return Distance.from_json(texts) if texts else None


def reference_of_artefact(calibration: Calibration | None) -> Distance | None:
    """The distance that a calibration keeps, if it is of the artefact's own activations.

    That of a calibration that predicts with a student is of the student's: then None.
    """
    if calibration is None or PredictionOptions.of(calibration.settings).student is not None:
        return None
    return kept_reference(calibration)


def lines_or_errors(
    rows: Sequence[Question], to_lines: Callable[[Sequence[Question]], Iterable[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """The lines that `to_lines` makes of rows; an `error` for a row whose logits are not finite.

    If some row's logits are not finite, each row is asked by itself.
    """
    try:
        return list(to_lines(rows)) if rows else []
    except NotFiniteLogits as problem:
        if len(rows) == 1:
            return [error_row(rows[0], problem)]
    lines = []
    for row in rows:
        lines += lines_or_errors([row], to_lines)
    return lines
