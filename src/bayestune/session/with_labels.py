"""Calibrates an artefact on labelled rows that its training did not see."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayestune import decisions
from bayestune.data import Question, load_rows
from bayestune.decisions import Asked, Calibration, HeldOut, Variant, score_rows
from bayestune.errors import NUMBER, PART, POSITIVE, Refusal, check_fields
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
from bayestune.session.gated import extra_scores
from bayestune.session.plain_adapter import is_plain
from bayestune.session.prediction_ways import Way, in_band, staged

_WARM_UP = 8  # rows predicted before time is taken: a model's first pass is slower
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
        cascade: share of the rows that are drawn for, after the student or the mean was asked; 0
            for no such way.

    Raises:
        Refusal: if a number is no number of draws, a factor not positive, or a share none.
    """

    draws: tuple[int, ...] = (0, 10)
    draw_seed: int = 0
    factors: tuple[float, ...] = (0.5, 2.0)
    student: Path | None = None
    bf16: bool | None = None
    cascade: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self, cascade=PART)
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
    _refuse_seen(given, place, put)
    _refuse_unlike(given, asked)
    decisions.parts(_held_out(given, put), asked)  # too few rows are refused before any pass
    artefact = Artefact.open(place, given, put, model)
    given = artefact.rows  # as they are put
    check_lengths(artefact.session.loaded.model, given, artefact.session.scorer.encode(given))
    held_out = replace(_held_out(given, put), extra=extra_scores(artefact.session, given))
    variants = _variants(artefact, compared)
    if compared.cascade:
        variants["cascade"] = _cascade(variants, held_out, asked, compared.cascade)
    digest = posterior_digest(place)
    found = decisions.calibrate(variants, held_out, asked, digest, artefact.fit.label)
    settings: dict[str, Any] = {**found.settings, "unsure": put.unsure}
    if is_plain(place):
        settings["adapter"] = artefact.fit.details
    scores = _scores(variants[found.variant].logits, found.temperature, held_out.extra)
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


def _refuse_seen(rows: Sequence[Question], place: Path, put: Put) -> None:
    """Refuses rows that training saw, by their content."""
    known: set[str] = set()
    if put.trained_on is not None:
        trained = load_rows(put.trained_on, put.options, labelled=False)
        known = {row.fingerprint for row in trained}
    if not is_plain(place):
        known |= seen_fingerprints(details_of(place), len(rows[0].fingerprint))
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


def _variants(artefact: Artefact, compared: Compared) -> dict[str, Variant]:
    """Every way of predicting on all rows, with its time."""
    precise = artefact.fit.bf16 if compared.bf16 is None else compared.bf16
    found = {}
    for way in compared.ways(artefact, precise):
        found[way.name(artefact.fit.posterior)] = _variant(artefact, way)
    if compared.student is not None:
        folder = artefact_folder(compared.student)
        near = os.path.relpath(folder.resolve(), artefact.place.resolve())
        digest = posterior_digest(folder)
        plain = Way(0, compared.draw_seed, precise)
        way = replace(plain, student=Path(near).as_posix(), student_digest=digest)
        found["student"] = _variant(artefact.student(folder), way)
    return found


def _variant(artefact: Artefact, way: Way) -> Variant:
    rows = artefact.rows
    scorer = artefact.session.quietly().scorer
    posterior = artefact.fit.posterior
    way.logits(posterior, scorer, rows[:_WARM_UP])
    begin = time.perf_counter()
    logits = artefact.logits(way)
    milliseconds = 1000 * (time.perf_counter() - begin) / len(rows)
    return Variant(logits, milliseconds, way.settings)


def _cascade(
    variants: Mapping[str, Variant], held_out: HeldOut, asked: Asked, share: float
) -> Variant:
    """The student, or else the mean, and the draws for the rows about which it is in doubt.

    The band is chosen on the rows for choices; the promise is for the whole cascade.
    """
    first = variants.get("student") or variants.get("mean")
    ways = [each for each in variants.values() if each.settings["draws"] > 0]
    if first is None or not ways:
        raise Refusal(
            f"got cascade={share} for {sorted(variants)}; expected a student or the mean, and "
            "draws; give --draws '[0, 10]' of a posterior that has both, or leave it out"
        )
    plain = [each for each in ways if each.settings["factor"] == 1] or ways
    drawn = max(plain, key=lambda each: each.settings["draws"])
    choosing, _ = decisions.parts(held_out, asked)
    quick = first.logits[0].double().softmax(-1)
    wrong = (quick.argmax(-1) != held_out.labels)[choosing]
    doubt = (1 - quick.amax(-1))[choosing]
    band = decisions.doubtful_band(doubt, wrong, asked.promise.risk, share)
    rows = in_band(first.logits, band).nonzero()[:, 0].tolist()
    logits = staged(first.logits, drawn.logits[:, rows], rows)
    milliseconds = first.milliseconds + drawn.milliseconds * len(rows) / len(held_out.labels)
    settings = {**drawn.settings, "band": list(band)}
    settings |= {name: first.settings[name] for name in ("student", "student_digest")}
    return Variant(logits, milliseconds, settings)


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
