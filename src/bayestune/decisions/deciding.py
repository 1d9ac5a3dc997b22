"""From draws to decisions, as a calibration says: the one function that every surface calls."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bayestune.decisions.calibration import Calibration
from bayestune.decisions.row_scores import ROW_SCORES, Spread, score_rows
from bayestune.decisions.sets import row_uniforms
from bayestune.errors import Refusal


@dataclass(frozen=True, eq=False)
class Decision:
    """The decisions on N rows, and what they are based on; entropies in nats.

    Args:
        probabilities: p̄ (N, C), at the calibration's temperature.
        total_entropy: (N,).
        expected_entropy: (N,).
        mutual_information: (N,), their difference times S/(S − 1), of S draws that are a sample.
        options: (N, C) bool, the options that each row has.
        decisions: a row each, "act" or "abstain"; with bands a band's name, or "ask" beyond the
            last one. None if uncalibrated.
        score: name of the score behind it; none if uncalibrated.
        values: of the score, (N,); infinite where the choice is the row's unsure option.
        thresholds: λ̂ of each row, NaN where nothing is ever acted on, (N,).
        sets: (N, C) bool; all options if uncalibrated.
        calibration: what was applied, or "none".
    """

    probabilities: Tensor
    total_entropy: Tensor
    expected_entropy: Tensor
    mutual_information: Tensor
    options: Tensor
    decisions: list[str] | None
    score: str | None
    values: Tensor
    thresholds: Tensor
    sets: Tensor
    calibration: dict[str, Any] | str

    @property
    def choice(self) -> Tensor:
        """The index of the likeliest option, the first of equals, (N,)."""
        return self.probabilities.argmax(-1)

    @property
    def confidence(self) -> Tensor:
        """The probability of the choice, (N,)."""
        return self.probabilities.amax(-1)

    def rows(self) -> list[dict[str, Any]]:
        """One JSON object a row; "probabilities" holds the row's own options, "set" indices.

        Numbers that JSON cannot hold, infinite scores and thresholds that act on nothing, are null.
        """
        columns = {
            "choice": self.choice.tolist(),
            "confidence": self.confidence.tolist(),
            "total_entropy": self.total_entropy.tolist(),
            "expected_entropy": self.expected_entropy.tolist(),
            "mutual_information": self.mutual_information.tolist(),
        }
        rows = []
        for index, exists in enumerate(self.options):
            row: dict[str, Any] = {"probabilities": self.probabilities[index][exists].tolist()}
            row |= {name: values[index] for name, values in columns.items()}
            row["calibration"] = self.calibration
            if self.decisions is not None:
                row["decision"] = self.decisions[index]
                row["score"] = {
                    "name": self.score,
                    "value": _none_if_not_finite(self.values[index]),
                    "threshold": _none_if_not_finite(self.thresholds[index]),
                }
                row["set"] = self.sets[index].nonzero()[:, 0].tolist()
            rows.append(row)
        return rows


def _none_if_not_finite(value: Tensor) -> float | None:
    return value.item() if value.isfinite() else None


def decide(
    calibration: Calibration | None,
    logits: Tensor,
    contents: Sequence[str] | None = None,
    unsure: Tensor | None = None,
    extra: Mapping[str, Tensor] | None = None,
    class_of: Tensor | None = None,
) -> Decision:
    """Decisions of N rows: acted on where the score is at most the threshold.

    Args:
        calibration: of this posterior (see `Calibration.check`); None for probabilities alone.
        logits: (S, N, C) of the calibration's variant, -inf where a row has fewer options.
        contents: the rows' contents, which a random tie-break of sets is made from.
        unsure: as in `HeldOut`: rows whose choice it is are never acted on, (N,).
        extra: further scores by name, (N,), if the calibration's score is one of them.
        class_of: (N, C), the class that each option is, −1 for none: thresholds by class are then
            for these; unless given, option c is class c.

    Raises:
        Refusal: if `logits` are not logits of draws, or contents or the score are needed and
            missing.

    >>> found = decide(None, torch.tensor([[[2.0, 0.0]]]))
    >>> found.calibration, found.decisions, round(found.confidence.item(), 3)
    ('none', None, 0.881)
    """
    temperature = calibration.temperature if calibration else 1.0
    spread = Spread.of(logits, temperature)
    undecided = _undecided(spread, options=logits[0] > -torch.inf)
    if calibration is None:
        return undecided
    values = _values(calibration, logits, extra or {})
    if unsure is not None:
        values = values.masked_fill(spread.choice == unsure, torch.inf)
    choices = spread.choice
    if class_of is not None:
        choices = class_of.gather(1, choices[:, None])[:, 0]
    decisions, thresholds = _decisions(calibration, values, choices)
    return replace(
        undecided,
        decisions=decisions,
        score=calibration.score,
        values=values,
        thresholds=thresholds,
        sets=_sets(calibration, spread.mean, undecided.options, contents),
        calibration=calibration.applied(),
    )


def _undecided(spread: Spread, options: Tensor) -> Decision:
    """Probabilities and entropies alone; `options` (N, C) are those that each row has."""
    unknown = torch.full((len(options),), torch.nan, dtype=torch.float64)
    return Decision(
        probabilities=spread.mean,
        total_entropy=spread.total_entropy(),
        expected_entropy=spread.expected_entropy(),
        mutual_information=spread.corrected_mutual_information(),
        options=options,
        decisions=None,
        score=None,
        values=unknown,
        thresholds=unknown,
        sets=options,
        calibration="none",
    )


def _values(calibration: Calibration, logits: Tensor, extra: Mapping[str, Tensor]) -> Tensor:
    """The calibration's score of each row, (N,)."""
    name = calibration.score
    if name in extra:
        return extra[name].double()
    if name not in ROW_SCORES:
        got = f"no score {name!r}"
        raise Refusal(f"got {got}; expected the one the calibration decides by; give it in extra")
    return score_rows(logits, (name,), calibration.temperature)[name]


def _decisions(
    calibration: Calibration, values: Tensor, choices: Tensor
) -> tuple[list[str], Tensor]:
    """Each row's decision and the threshold λ̂ behind it, that of the widest band for "ask".

    Args:
        calibration: with its thresholds.
        values: of its score, (N,).
        choices: the class that each row's choice is, (N,); −1 for none.
    """
    if calibration.bands:
        return _banded(calibration, values)
    thresholds = torch.full_like(values, _nan_if_none(calibration.threshold.value))
    if calibration.classes:
        by_class = [_nan_if_none(threshold.value) for threshold in calibration.classes.values()]
        nothing = torch.full_like(values, torch.nan)  # nothing is promised about other options
        of_choices = torch.tensor(by_class, dtype=values.dtype)[choices.clamp_min(0)]
        thresholds = torch.where(choices < 0, nothing, of_choices)
    acts = (values <= thresholds).tolist()  # False for NaN
    return ["act" if act else "abstain" for act in acts], thresholds


def _banded(calibration: Calibration, values: Tensor) -> tuple[list[str], Tensor]:
    """The same with bands: each row is in the strictest band whose threshold it keeps."""
    decisions = ["ask"] * len(values)
    thresholds = torch.full_like(values, torch.nan)
    # From the widest to the strictest, which has the last word.
    for name, band in reversed(list(calibration.bands.items())):
        if thresholds.isnan().all():  # the widest band that acts at all
            thresholds = torch.full_like(values, _nan_if_none(band.value))
        for index in band.acts(values).nonzero()[:, 0].tolist():
            decisions[index] = name
            thresholds[index] = _nan_if_none(band.value)
    return decisions, thresholds


def _nan_if_none(value: float | None) -> float:
    return float("nan") if value is None else value


def _sets(
    calibration: Calibration, p: Tensor, options: Tensor, contents: Sequence[str] | None
) -> Tensor:
    """Each row's set, (N, C) bool, by the rule that the calibration's decisions carry."""
    rule = calibration.sets[calibration.set_kind]
    if rule.kind != "aps":
        return rule.sets(p, options)
    if contents is None:
        got = "no contents"
        raise Refusal(f'got {got}; expected one a row, for the tie-break of "aps"; give contents')
    return rule.sets(p, options, row_uniforms(contents))
