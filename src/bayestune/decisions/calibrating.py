"""Calibrates once, on held-out rows: chooses on one part, makes its promises on the other.

Choosing variant, temperature or score on the rows that a threshold is then set on breaks the
promise: with eight useless scores it failed in 46 % of runs, where at most 10 % may fail.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from typing import Self, get_args

import torch
from torch import Tensor

from bayestune.decisions.bands import (
    band_promises,
    band_thresholds,
    class_thresholds,
)
from bayestune.decisions.bounds import Promise, rows_needed
from bayestune.decisions.calibration import Calibration
from bayestune.decisions.calibration_options import CalibrationOptions
from bayestune.decisions.comparing import HeldOut, Variant, check_variants, compare, kept
from bayestune.decisions.costs import check_costs, losses_of
from bayestune.decisions.gating import free_baselines
from bayestune.decisions.row_scores import Spread, score_rows
from bayestune.decisions.sets import (
    SetKind,
    SetRule,
    check_set_rows,
    fit_sets,
    row_uniforms,
)
from bayestune.decisions.tempering import compared_temperature
from bayestune.decisions.thresholds import (
    Threshold,
    check_enough,
    likely_start,
    threshold,
)
from bayestune.errors import Refusal
from bayestune.runtime import versions

_versions = cache(versions)  # reading them takes longer than a small calibration
_FEWEST_CHOOSING = 2  # rows: one to fit a temperature on, and another to judge it by


@dataclass(frozen=True, eq=False)
class _Part:
    """The n rows of one part, for choices or for promises.

    Args:
        scores: by name, (n,) each; infinite where the choice is the row's unsure option.
        losses: of the choices, (n,).
        spread: the draws' probabilities, at the temperature.
        labels: (n,).
        contents: n texts.
        rows: indices of the rows among all held-out ones, (n,).
    """

    scores: dict[str, Tensor]
    losses: Tensor
    spread: Spread
    labels: Tensor
    contents: Sequence[str]
    rows: Tensor

    @classmethod
    def of(
        cls,
        logits: Tensor,
        temperature: float,
        held_out: HeldOut,
        rows: Tensor,
        options: CalibrationOptions,
    ) -> Self:
        """The part of the rows with these indices, at a temperature."""
        of_part = logits[:, rows]
        spread = Spread.of(of_part, temperature)
        scores = score_rows(of_part, options.scores, temperature)
        scores |= {name: values[rows].double() for name, values in held_out.extra.items()}
        if held_out.unsure is not None:
            is_unsure = spread.choice == held_out.unsure[rows]
            scores = {name: s.masked_fill(is_unsure, torch.inf) for name, s in scores.items()}
        labels = held_out.labels[rows]
        losses = losses_of(spread.choice, labels, options.costs)
        contents = [held_out.contents[int(index)] for index in rows.tolist()]
        return cls(scores, losses, spread, labels, contents, rows)


def calibrate(
    variants: Mapping[str, Variant],
    held_out: HeldOut,
    options: CalibrationOptions | None = None,
    posterior: str = "",
    method: str = "",
) -> Calibration:
    """Chooses how to predict and when to act, on held-out rows.

    One part of the rows compares the variants, as they are and with a temperature, and keeps the
    cheapest that is not significantly worse than the best; fits its temperature; and takes the
    score of the lowest area under the risk–coverage curve. The other part gives each score's
    threshold, and the sets. Which part a row is in depends on its content alone.

    Args:
        variants: ways of predicting by name, on all rows.
        held_out: the rows.
        options: the promises; an error rate of 0.05 with confidence 0.9 unless given.
        posterior: digest of the posterior, which the calibration is bound to.
        method: how it was fitted, for people.

    Returns:
        The calibration, with the table of the variants.

    Raises:
        Refusal: if training saw some of the rows, the variants are not of these rows, or there are
            too few rows for what is asked, whatever the model.
    """
    options = options or CalibrationOptions()
    check_variants(variants, held_out)
    num_classes = next(iter(variants.values())).logits.shape[-1]
    first, second = parts(held_out, options, num_classes)
    labels = held_out.labels[first]
    on_first = {
        name: Variant(variant.logits[:, first], variant.milliseconds)
        for name, variant in variants.items()
    }
    trial, table = kept(compare(on_first, labels, options.folds))
    chosen = variants[trial.variant]
    logits = chosen.logits
    held_out = replace(held_out, extra={**held_out.extra, **chosen.extra})
    temperature = compared_temperature(logits[:, first], labels) if trial.tempered else 1.0
    choosing = _Part.of(logits, temperature, held_out, first, options)
    promising = _Part.of(logits, temperature, held_out, second, options)
    areas = {name: _area(scores, choosing.losses) for name, scores in choosing.scores.items()}
    score = min(areas, key=areas.__getitem__)
    bands = _bands(choosing, promising, score, options)
    classes = _classes(choosing, promising, score, options, num_classes)
    return Calibration(
        posterior=posterior,
        method=method,
        variant=trial.variant,
        temperature=temperature,
        score=score,
        thresholds=_thresholds(choosing, promising, options),
        sets=_sets(promising, options.set_coverage),
        set_kind=options.set_kind,
        num_choosing=len(first),
        num_thresholds=len(second),
        rows=held_out.digest(),
        bands=bands,
        classes={str(index): of_class for index, of_class in classes.items()},
        costs=None if options.costs is None else options.costs.tolist(),
        table=table,
        versions=_versions(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        settings=dict(chosen.settings),
        baselines=_baselines(promising, logits[0]),
    )


def parts(
    held_out: HeldOut, options: CalibrationOptions, num_classes: int | None = None
) -> tuple[Tensor, Tensor]:
    """Indices of the rows for the choices, and of those for the promises.

    Args:
        held_out: the rows, of which each content counts once.
        options: the promises.
        num_classes: C, the most options that a row has; None leaves promises of classes unchecked.

    Returns:
        Two tensors of indices, n₁ and n₂ of them, in the order of `HeldOut.order`.

    Raises:
        Refusal: if there are too few rows for what is asked, whatever the model, or costs are of
            another number of classes.
    """
    if options.costs is not None:
        check_costs(options.costs, num_classes)
    order = held_out.order()
    num_choosing = round(options.choosing_share * len(order))
    promising = len(order) - num_choosing
    share = 1 - options.choosing_share
    check_enough(promising, _strictest(options, num_classes), share)
    check_set_rows(promising, options.set_coverage, share)
    if num_choosing < _FEWEST_CHOOSING:
        total = math.ceil(_FEWEST_CHOOSING / options.choosing_share)
        raise Refusal(
            f"got {num_choosing} rows to choose a way of predicting on; expected "
            f"{_FEWEST_CHOOSING} or more; give {total} held-out rows in all"
        )
    return order[:num_choosing], order[num_choosing:]


def _strictest(options: CalibrationOptions, num_classes: int | None) -> Promise:
    """The promise that needs the most rows."""
    promises = [options.promise]
    if options.per_class and num_classes:
        promises.append(options.promise.shared_by(num_classes))
    if options.bands:
        promises += band_promises(options.bands, options.promise.confidence).values()
    return max(promises, key=rows_needed)


def _area(scores: Tensor, losses: Tensor) -> float:
    """Mean over coverages of the mean loss among the rows acted on; ∞ for a constant score."""
    finite = scores[scores.isfinite()]
    if len(finite) == 0 or finite.min() == finite.max():
        return torch.inf
    num_acted = torch.arange(1, len(scores) + 1, dtype=torch.float64)
    ranked = losses[scores.argsort(stable=True)]
    return (ranked.cumsum(0) / num_acted).mean().item()


def _thresholds(
    choosing: _Part, promising: _Part, options: CalibrationOptions
) -> dict[str, Threshold]:
    """The threshold of each score, by its name."""
    thresholds = {}
    promise = options.promise
    bounded = options.costs is not None
    for name, scores in promising.scores.items():
        start = likely_start(choosing.scores[name], choosing.losses, len(scores), promise)
        thresholds[name] = threshold(scores, promising.losses, promise, start, bounded=bounded)
    return thresholds


def _bands(
    choosing: _Part, promising: _Part, score: str, options: CalibrationOptions
) -> dict[str, Threshold]:
    """The bands' thresholds on the chosen score, by name; none unless asked for."""
    if not options.bands:
        return {}
    scores = promising.scores[score]
    confidence = options.promise.confidence
    starts = {}
    for name, promise in band_promises(options.bands, confidence).items():
        starts[name] = likely_start(choosing.scores[score], choosing.losses, len(scores), promise)
    bounded = options.costs is not None
    return band_thresholds(
        scores, promising.losses, options.bands, confidence, starts, bounded=bounded
    )


def _classes(
    choosing: _Part, promising: _Part, score: str, options: CalibrationOptions, num_classes: int
) -> dict[int, Threshold]:
    """The thresholds of each choice on the chosen score, by class; none unless asked for."""
    if not options.per_class:
        return {}
    scores = promising.scores[score]
    choices = promising.spread.choice
    of_class = options.promise.shared_by(num_classes)
    most = int(torch.bincount(choices).max())
    check_enough(most, of_class, (1 - options.choosing_share) * most / len(scores))
    starts = []
    for index in range(num_classes):
        chosen = choosing.spread.choice == index
        starts.append(
            likely_start(
                choosing.scores[score][chosen],
                choosing.losses[chosen],
                int((choices == index).sum()),
                of_class,
            )
        )
    bounded = options.costs is not None
    return class_thresholds(
        scores, promising.losses, choices, options.promise, starts, bounded=bounded
    )


def _baselines(part: _Part, logits: Tensor) -> dict[str, float]:
    """`Calibration.baselines` on a part; `logits` (N, C), of one draw, show each row's options."""
    num_options = (logits > -torch.inf).sum(-1)
    free = free_baselines(part.labels, num_options[part.rows])
    return free | {"always_act": part.losses.mean().item()}


def _sets(part: _Part, coverage: float) -> dict[str, SetRule]:
    """The fitted rule of each kind of set."""
    ties = row_uniforms(part.contents)
    p = part.spread.mean
    return {kind: fit_sets(p, part.labels, kind, coverage, ties) for kind in get_args(SetKind)}
