"""The ways of predicting that a calibration compares, each tried on the held-out rows."""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from bayestune import decisions
from bayestune.data import Question, own_task
from bayestune.decisions import CalibrationOptions, Distance, HeldOut, Variant
from bayestune.errors import NUMBER, PART, POSITIVE, Refusal, check_fields
from bayestune.posteriors import Gaussian, artefact_folder, posterior_digest
from bayestune.session.artefact import Artefact
from bayestune.session.prediction_options import PredictionOptions, in_band, staged
from bayestune.session.row_predictor import DISTANCE

_log = logging.getLogger(__name__)

_WARM_UP = 8  # rows predicted before time is taken: a model's first pass is slower
_MOST_TRAINED = 500  # training rows that distances are taken from: enough for r numbers a slot


@dataclass(frozen=True)
class VariantOptions:
    """Which ways of predicting are compared.

    Args:
        draws: numbers of draws; 0 is the mean.
        draw_seed: which set of draws: the same seed gives the same draws.
        factors: on the draws' spread Ω, tried with the largest number of draws, of a Gaussian
            posterior alone.
        student: folder of a student, if there is one.
        bf16: whether to predict under bfloat16 autocast; left out: as fitted.
        cascade: share of the rows that go on to the draws, after the student or the mean answered;
            0 for no cascade.

    Raises:
        Refusal: if a number of draws is negative or not whole, a factor is not positive, or
            `cascade` is not in [0, 1).
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

    def ways(self, artefact: Artefact, bf16: bool) -> list[PredictionOptions]:
        """The ways that a posterior has, without its student."""
        posterior = artefact.fit.posterior
        if posterior.atoms is not None:
            count = 0 if posterior.atoms == 1 else posterior.atoms  # a point's draw is its mean
            return [PredictionOptions(count, self.draw_seed, bf16)]
        counts = [count for count in self.draws if count or posterior.has_mean]
        ways = [PredictionOptions(count, self.draw_seed, bf16) for count in dict.fromkeys(counts)]
        most = max(counts, default=0)
        if isinstance(posterior, Gaussian) and most:
            factors = [factor for factor in self.factors if factor != 1]
            ways += [PredictionOptions(most, self.draw_seed, bf16, factor) for factor in factors]
        return ways


def variants_of(
    artefact: Artefact, compared: VariantOptions, trained: Sequence[Question]
) -> dict[str, Variant]:
    """Each way of predicting by its name: the held-out rows' logits, times and distances.

    A student comes last; its adapter then stands on the base model in the artefact's place.

    Args:
        artefact: opened with the held-out rows.
        compared: which ways.
        trained: training rows, from which distances are taken; none for no distances.
    """
    bf16 = artefact.fit.bf16 if compared.bf16 is None else compared.bf16
    variants = {}
    ways = compared.ways(artefact, bf16)
    distances = _distances(artefact, ways[0], trained)
    for way in ways:
        name = way.name(artefact.fit.posterior)
        variants[name] = distances.added_to(_variant(artefact, way))
    if compared.student is not None:
        folder = artefact_folder(compared.student)
        relative = os.path.relpath(folder.resolve(), artefact.place.resolve())
        digest = posterior_digest(folder)
        mean = PredictionOptions(0, compared.draw_seed, bf16)
        way = replace(mean, student=Path(relative).as_posix(), student_digest=digest)
        student = artefact.student(folder)
        distances = _distances(student, way, trained)
        variants["student"] = distances.added_to(_variant(student, way))
    return variants


@dataclass(frozen=True, eq=False)
class _Distances:
    """How far the held-out rows are from the training rows; both None where that is unknown.

    Args:
        distance: gives the distances of new rows.
        scores: those of the held-out rows, (N,).
    """

    distance: Distance | None = None
    scores: Tensor | None = None

    def added_to(self, variant: Variant) -> Variant:
        """The variant with its distances, and in its settings what gives those of new rows."""
        if self.distance is None or self.scores is None:
            return variant
        settings = {**variant.settings, DISTANCE: self.distance.to_json()}
        return replace(variant, settings=settings, extra={DISTANCE: self.scores})


def _distances(
    artefact: Artefact, way: PredictionOptions, trained: Sequence[Question]
) -> _Distances:
    """Distances in the adapter's activations; none without training rows or a mean adapter."""
    if not trained:
        return _Distances()
    if not artefact.fit.posterior.has_mean:
        _log.warning("no distance: the posterior has no mean adapter to tell activations by")
        return _Distances()
    predictor = artefact.predictor(way)
    step = -(-len(trained) // _MOST_TRAINED)
    task = own_task("trained on", (), trained[::step])
    reference = artefact.session.quietly().on(task).task.evaluation
    try:
        distance = Distance.fit(predictor.activations(reference))
    except Refusal as problem:
        _log.warning("no distance: %s", problem)
        return _Distances()
    return _Distances(distance, distance.of(predictor.activations(artefact.rows)))


def _variant(artefact: Artefact, way: PredictionOptions) -> Variant:
    """The artefact's rows predicted in one way, after a warm-up, with the time of a row."""
    rows = artefact.rows
    predictor = artefact.predictor(way)
    predictor.at(rows[:_WARM_UP])
    begin = time.perf_counter()
    logits = predictor.over(rows).logits
    milliseconds = 1000 * (time.perf_counter() - begin) / len(rows)
    return Variant(logits, milliseconds, way.settings)


def cascade_of(
    variants: Mapping[str, Variant], held_out: HeldOut, options: CalibrationOptions, share: float
) -> Variant:
    """The student, or without one the mean; and the draws for the rows it is in doubt about.

    The band is chosen on the rows for choices; the promise is for the whole cascade. Distances are
    those of what is asked first.

    Args:
        variants: by name, as `variants_of` gives them.
        held_out: the same rows.
        options: how they are parted, and the promise.
        share: of the rows, that go on to the draws.

    Raises:
        Refusal: if there is neither a student nor the mean, or no variant has draws.
    """
    first = variants.get("student") or variants.get("mean")
    with_draws = [each for each in variants.values() if each.settings["draws"] > 0]
    if first is None or not with_draws:
        raise Refusal(
            f"got cascade={share} for {sorted(variants)}; expected a student or the mean, and "
            "draws; give --draws '[0, 10]' of a posterior that has both, or leave it out"
        )
    unscaled = [each for each in with_draws if each.settings["factor"] == 1] or with_draws
    drawn = max(unscaled, key=lambda each: each.settings["draws"])
    choosing, _ = decisions.parts(held_out, options, first.logits.shape[-1])
    p_first = first.logits[0].double().softmax(-1)
    wrong = (p_first.argmax(-1) != held_out.labels)[choosing]
    doubt = (1 - p_first.amax(-1))[choosing]
    band = decisions.doubtful_band(doubt, wrong, options.promise.risk, share)
    rows = in_band(first.logits, band).nonzero()[:, 0].tolist()
    logits = staged(first.logits, drawn.logits[:, rows], rows)
    milliseconds = first.milliseconds + drawn.milliseconds * len(rows) / len(held_out.labels)
    settings = {**drawn.settings, "band": list(band)}
    settings.pop(DISTANCE, None)
    names = ("student", "student_digest", DISTANCE)
    settings |= {name: first.settings[name] for name in names if name in first.settings}
    return Variant(logits, milliseconds, settings, first.extra)
