"""Calibrates an artefact on labelled rows that its training did not see."""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayestune import decisions
from bayestune.data import Question, own_task
from bayestune.decisions import Asked, Calibration, Distance, HeldOut, Variant, score_rows
from bayestune.errors import NUMBER, POSITIVE, Refusal
from bayestune.posteriors import Gaussian, artefact_folder, posterior_digest
from bayestune.scoring import check_lengths
from bayestune.session.artefact import (
    Artefact,
    Put,
    Rows,
    content_of,
    rows_of,
    unsure_options,
)
from bayestune.session.as_fitted import seen_fingerprints
from bayestune.session.fit import details_of
from bayestune.session.looks import DISTANCE, prompt_lengths
from bayestune.session.plain_adapter import is_plain
from bayestune.session.prediction_ways import Way

_log = logging.getLogger(__name__)

_WARM_UP = 8  # rows predicted before time is taken: a model's first pass is slower
_MOST_TRAINED = 500  # training rows that distances are taken from: enough for r numbers a slot
_DIGITS = 8  # of the held-out scores that are kept


@dataclass(frozen=True)
class Compared:
    """Which ways of predicting are compared.

    Args:
        draws: numbers of draws; 0 is the mean.
        draw_seed: of the held draws.
        factors: on Ω, tried with the largest number of draws if the posterior is a Gaussian.
        student: folder of a student, if there is one.
        bf16: whether to predict under bfloat16 autocast; left out: as fitted.

    Raises:
        Refusal: if a number is no number of draws, or a factor not positive.
    """

    draws: tuple[int, ...] = (0, 10)
    draw_seed: int = 0
    factors: tuple[float, ...] = (0.5, 2.0)
    student: Path | None = None
    bf16: bool | None = None

    def __post_init__(self) -> None:
        wrong = [count for count in self.draws if count not in NUMBER]
        if wrong or not self.draws:
            raise Refusal(f"got draws={list(self.draws)}; expected {NUMBER.said}; 0 is the mean")
        if any(factor not in POSITIVE for factor in self.factors):
            raise Refusal(f"got factors={list(self.factors)}; expected {POSITIVE.said}; correct it")

    def ways(self, artefact: Artefact, bf16: bool) -> list[Way]:
        """The ways that a posterior has, without its student."""
        posterior = artefact.fit.posterior
        if posterior.atoms is not None:
            return [Way(0 if posterior.has_mean else posterior.atoms, self.draw_seed, bf16)]
        counts = [count for count in self.draws if count or posterior.has_mean]
        ways = [Way(count, self.draw_seed, bf16) for count in dict.fromkeys(counts)]
        most = max(counts, default=0)
        if isinstance(posterior, Gaussian) and most:
            factors = [factor for factor in self.factors if factor != 1]
            ways += [Way(most, self.draw_seed, bf16, factor) for factor in factors]
        return ways


def calibrate(
    folder: Path | str,
    rows: Rows,
    asked: Asked | None = None,
    compared: Compared | None = None,
    put: Put | None = None,
    model: str | None = None,
) -> Calibration:
    """Chooses on held-out rows how an artefact predicts and when one may act on it; keeps that.

    `calibration.json` beside the artefact holds what was chosen, bound to the artefact by its
    digest: `predict`, `evaluate` and `decide` apply it.

    Args:
        folder: of `fit`, or any LoRA adapter's.
        rows: questions with answers that training did not see, or a file of them.
        asked: the promises; an error rate of 0.05 with confidence 0.9 unless given.
        compared: the ways of predicting.
        put: how rows are read and put.
        model: the base model, where it has moved, or where the adapter does not name it.

    Returns:
        The calibration, which is written.

    Raises:
        Refusal: if training saw some of the rows, or there are too few for what is asked.
    """
    asked = asked or Asked()
    compared = compared or Compared()
    place = artefact_folder(folder)
    put = put or Put()
    put.check(place)
    given = rows_of(rows, place, put, labelled=True)
    trained = _trained_on(place, put)
    _refuse_seen(given, trained, [place, *([compared.student] if compared.student else [])])
    _refuse_unlike(given, asked)
    decisions.parts(_held_out(given, put), asked)  # too few rows are refused before any pass
    artefact = Artefact.open(place, given, put, model)
    given = artefact.rows  # as they are put
    check_lengths(artefact.session.loaded.model, given, artefact.session.scorer.encode(given))
    scorer = artefact.session.quietly().scorer
    held_out = replace(_held_out(given, put), extra=prompt_lengths(scorer, given))
    variants = _variants(artefact, compared, trained)
    digest = posterior_digest(place)
    found = decisions.calibrate(variants, held_out, asked, digest, artefact.fit.label)
    kept = variants[found.variant]
    settings: dict[str, Any] = {**found.settings, "unsure": put.unsure}
    if asked.per_class:
        settings["classes"] = given[0].options
    if is_plain(place):
        settings["adapter"] = artefact.fit.details
    scores = _scores(kept.logits, found.temperature, {**held_out.extra, **kept.extra})
    found = replace(found, settings=settings, held_out=scores)
    found.write(place)
    return found


def _held_out(rows: Sequence[Question], put: Put) -> HeldOut:
    labels = torch.tensor([row.answer for row in rows])
    places = unsure_options(rows, put.unsure)
    if places is not None and max(places) < 0:
        got = f"no row with the option {put.unsure!r}"
        raise Refusal(f"got {got}; expected some; look at its spelling, or leave --unsure out")
    unsure_of = None if places is None else torch.tensor(places)
    return HeldOut(labels, [content_of(row) for row in rows], unsure_of)


def _trained_on(place: Path, put: Put) -> tuple[Question, ...]:
    """The rows of the file that training saw, by what the folder tells, else all of them.

    Raises:
        Refusal: if training saw none of them.
    """
    if put.trained_on is None:
        return ()
    rows = rows_of(put.trained_on, place, put, labelled=False)
    details = {} if is_plain(place) else details_of(place)
    if "seen" not in details:
        return rows
    known = seen_fingerprints(details, len(rows[0].fingerprint))
    found = tuple(row for row in rows if row.fingerprint in known)
    if not found:
        raise Refusal(
            f"got {put.trained_on}, of whose {len(rows)} rows {place} was fitted on none; expected "
            "the rows of its training; give those, or leave --trained_on out"
        )
    return found


def _refuse_seen(
    rows: Sequence[Question], trained: Sequence[Question], folders: Sequence[Path]
) -> None:
    """Refuses rows that training saw, a student's too, by their content."""
    known = {row.fingerprint for row in trained}
    for folder in folders:
        if not is_plain(folder):
            known |= seen_fingerprints(details_of(folder), len(rows[0].fingerprint))
    both = [row.id for row in rows if row.fingerprint in known]
    if both:
        raise Refusal(
            f"got {len(both)} of {len(rows)} rows that training saw, such as {both[0]}; expected "
            "others: a model is surer of what it was fitted on; hold rows out of training"
        )


def _refuse_unlike(rows: Sequence[Question], asked: Asked) -> None:
    """Refuses promises about classes where the rows' options are not classes."""
    if (asked.per_class or asked.costs is not None) and len({row.options for row in rows}) > 1:
        raise Refusal(
            "got promises about classes, or costs of errors, for rows of unlike options; expected "
            "the same options in the same order in every row; leave --per_class and --costs out"
        )


def _variants(
    artefact: Artefact, compared: Compared, trained: Sequence[Question]
) -> dict[str, Variant]:
    """Every way of predicting on all rows, with its time, and its distances."""
    precise = artefact.fit.bf16 if compared.bf16 is None else compared.bf16
    found = {}
    ways = compared.ways(artefact, precise)
    near = _near(artefact, ways[0], trained)
    for way in ways:
        found[way.name(artefact.fit.posterior)] = near.put_on(_variant(artefact, way))
    if compared.student is not None:
        folder = artefact_folder(compared.student)
        seen_from = os.path.relpath(folder.resolve(), artefact.place.resolve())
        digest = posterior_digest(folder)
        way = Way(0, compared.draw_seed, precise, 1.0, Path(seen_from).as_posix(), digest)
        student = artefact.student(folder)
        near = _near(student, way, trained)
        found["student"] = near.put_on(_variant(student, way))
    return found


@dataclass(frozen=True, eq=False)
class _Near:
    """How far the held-out rows are from the training rows, where these are known."""

    distance: Distance | None = None
    scores: Tensor | None = None

    def put_on(self, variant: Variant) -> Variant:
        """The variant with its distances, and what gives those of new rows."""
        if self.distance is None or self.scores is None:
            return variant
        settings = {**variant.settings, DISTANCE: self.distance.to_json()}
        return replace(variant, settings=settings, extra={DISTANCE: self.scores})


def _near(artefact: Artefact, way: Way, trained: Sequence[Question]) -> _Near:
    """Distances in the adapter's activations; none without training rows or a mean adapter."""
    if not trained:
        return _Near()
    if not artefact.fit.posterior.has_mean:
        _log.warning("no distance: the posterior has no mean adapter to tell activations by")
        return _Near()
    looking = artefact.looking(way)
    step = -(-len(trained) // _MOST_TRAINED)
    task = own_task("trained on", (), trained[::step])
    reference = artefact.session.quietly().on(task).task.evaluation
    try:
        distance = Distance.fit(looking.activations(reference))
    except Refusal as problem:
        _log.warning("no distance: %s", problem)
        return _Near()
    return _Near(distance, distance.of(looking.activations(artefact.rows)))


def _variant(artefact: Artefact, way: Way) -> Variant:
    rows = artefact.rows
    scorer = artefact.session.quietly().scorer
    posterior = artefact.fit.posterior
    way.logits(posterior, scorer, rows[:_WARM_UP])
    begin = time.perf_counter()
    logits = artefact.looking(way).over(rows).logits
    milliseconds = 1000 * (time.perf_counter() - begin) / len(rows)
    return Variant(logits, milliseconds, way.settings)


def _scores(
    logits: Tensor, temperature: float, extra: Mapping[str, Tensor]
) -> dict[str, list[float]]:
    """What new rows are compared with: every score of the variant that varies, and the others."""
    found = score_rows(logits, temperature=temperature) | dict(extra)
    kept = {}
    for name, values in found.items():
        if values.max() > values.min():
            kept[name] = [round(value, _DIGITS) for value in values.tolist()]
    return kept
