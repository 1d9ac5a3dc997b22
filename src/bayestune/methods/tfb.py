"""TFB: training-free Bayesianisation of an adapter that is trained already."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from bayestune.adapters import Slots, make_gaussian
from bayestune.data import Question
from bayestune.decisions import predictive_nll
from bayestune.errors import COUNT, NOT_NEGATIVE, POSITIVE, Refusal, check_fields
from bayestune.forward import Draws
from bayestune.methods.held_out import head_slots
from bayestune.methods.method import Method
from bayestune.methods.mle import MLE
from bayestune.methods.workplace import refuse_parts_of
from bayestune.posteriors import Gaussian, Point, Posterior, Tempered
from bayestune.scoring import Scorer, row_logits
from bayestune.training import Meter, Training

logger = logging.getLogger(__name__)


def as_point(posterior: Posterior) -> Point:
    """The posterior's mean adapter as a point; its slots get plain layers.

    Raises:
        Refusal: if it has no mean, or a temperature.
    """
    if not posterior.has_mean:
        raise Refusal(
            f"TFB starts from one adapter: got a {type(posterior).__name__} without a mean; use "
            "its base"
        )
    if isinstance(posterior, Tempered):
        raise Refusal(
            "TFB takes an adapter, which has no temperature: got one with a temperature, expected "
            "such as a Point; put the temperature around TFB"
        )
    slots = Slots(posterior.model, posterior.adapter)
    plain = {}
    for name, slot in slots.modules().items():
        if type(slot) is not nn.Linear:
            weight = slot.get_parameter("weight")
            plain[name] = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            plain[name].weight = weight
    slots.put(plain)
    return Point(
        posterior.model, posterior.scorer, adapter=posterior.adapter, report=posterior.report
    )


def rotate_(slots: Slots) -> dict[str, Tensor]:
    """Rotates each layer's factors in place so that B's columns are orthogonal.

    With B = U diag(d) Vᵀ (thin SVD), B ← U diag(d) and A ← Vᵀ A: the product B A, and so the model,
    stays what it was.

    Returns:
        d (r,) of each layer, float64 on the CPU, by the name of its slot A.
    """
    values = {}
    modules = slots.modules()
    for name in slots.names():
        a = modules[name].get_parameter("weight")
        b = modules[name.removesuffix("A") + "B"].get_parameter("weight")
        u, d, vt = torch.linalg.svd(b.detach().double(), full_matrices=False)
        with torch.no_grad():
            b.copy_(u * d)
            a.copy_(vt @ a.double())
        values[name] = d.cpu()
    return values


def set_isotropic_(posterior: Gaussian, values: dict[str, Tensor], std: float) -> None:
    """Sets Ω_ij = σ_q/d_i, and 0 where d_i is 0: B has no direction there.

    Args:
        posterior: whose slots are set.
        values: d (r,) by slot name, as `rotate_` returns them.
        std: σ_q.
    """
    for name, slot in posterior.layers().items():
        d = values[name]
        present = d > 1e-6 * d.max().clamp_min(1e-12)
        root = torch.where(present, std / d.clamp_min(1e-12), 0.0).sqrt()
        slot.set_root_std(root[:, None].expand_as(slot.root_std))


@dataclass(frozen=True)
class TFB:
    """q(A') = N(Vᵀ A, Ω²), Ω_ij = σ_q/d_i: the variance of W is isotropic on B's column space.

    All layers share one σ_q, the largest found at which the anchor rows' metric l is not worse by
    more than the tolerance: l(σ) − l(0) ≤ tolerance·l(0) for the NLL, l(0) − l(σ) ≤ tolerance for
    the accuracy. It is doubled until that fails, then bisected on a log scale. The published rule
    bounds |l(σ) − l(0)|, so a noise that improves the NLL would be too much; here it is not.

    If no σ_q that was tried is too much, the largest of them is taken, a warning says so, and the
    report's `too_much_found` is false: the anchor rows would allow more.

    Args:
        base: what fits the adapter; its posterior's mean is taken.
        metric: "nll" or "accuracy" of the anchor rows.
        tolerance: None for the published: 0.003 of the NLL, 0.01 of the accuracy.
        anchors: the first so many training rows.
        draws: S of the search.
        start: the first σ_q tried.
        evaluations: how many σ_q are tried.
        layers: "all", or "last", noise on the output head's adapter alone.

    Raises:
        Refusal: if the metric is unknown.

    Reference:
        Shi, Wang, Han, Zhang, Wang: Training-free Bayesianization for low-rank adapters of LLMs,
        2024, https://arxiv.org/abs/2412.05723.
    """

    base: Method = field(default_factory=MLE)
    metric: Literal["nll", "accuracy"] = "nll"
    tolerance: float | None = None
    anchors: int = 500
    draws: int = 10
    start: float = 0.001
    evaluations: int = 12
    layers: Literal["all", "last"] = "all"

    def __post_init__(self) -> None:
        if self.metric not in ("nll", "accuracy"):
            raise Refusal(f"unknown metric: got {self.metric!r}, expected 'nll' or 'accuracy'")
        check_fields(self, anchors=COUNT, draws=COUNT, evaluations=COUNT)
        check_fields(self, start=POSITIVE, tolerance=NOT_NEGATIVE)

    def fit(self, model: nn.Module, scorer: Scorer, training: Training) -> Gaussian:
        """Fits the base, then the standard deviation."""
        refuse_parts_of("TFB")
        point = as_point(self.base.fit(model, scorer, training))
        anchors = scorer.task.train[: self.anchors]
        return self.bayesianise(point, scorer, anchors, bf16=training.bf16)

    def bayesianise(
        self, point: Point, scorer: Scorer, rows: Sequence[Question], *, bf16: bool = False
    ) -> Gaussian:
        """Gives an adapter, however trained, the standard deviation that anchor rows allow.

        Args:
            point: the adapter; its factors are rotated and its slots become Gaussian.
            scorer: of the rows.
            rows: the anchor rows.
            bf16: whether passes run under autocast.

        Raises:
            Refusal: if a row has no answer, or there are none.
        """
        if not rows or any(row.answer is None for row in rows):
            raise Refusal(
                f"TFB needs anchor rows with answers: got {len(rows)} rows, not all with one"
            )
        meter = Meter()
        slots = point.slots
        values = rotate_(slots)
        names = head_slots(slots) if self.layers == "last" else list(values)
        make_gaussian(slots, names)
        posterior = Gaussian(point.model, point.scorer, adapter=point.adapter)
        encoded = scorer.encode(rows)
        labels = torch.tensor([row.answer for row in rows])

        def loss(std: float) -> float:
            set_isotropic_(posterior, values, std)
            draws = Draws(self.draws if std else 0, bf16=bf16)
            logits = row_logits(posterior, scorer, encoded, draws).double()
            if self.metric == "nll":
                return predictive_nll(logits, labels).item()
            return (logits.softmax(-1).mean(0).argmax(-1) == labels).double().mean().item()

        best, tried = self._search(loss)
        set_isotropic_(posterior, values, best)
        bounded = any(std > best for std, _ in tried)
        if not bounded:
            logger.warning(
                "TFB: none of %d standard deviations was too much for the anchor rows; %.4g, the "
                "largest tried, is taken, and more would be allowed: raise start or evaluations",
                len(tried) - 1,
                best,
            )
        chosen = {"isotropic_std": best, "search": tried, "too_much_found": bounded}
        chosen["base_seconds"] = point.report.seconds
        posterior.report = point.report.plus(**meter.read(), **chosen)
        return posterior

    def _search(self, loss: Callable[[float], float]) -> tuple[float, list[tuple[float, float]]]:
        """The largest feasible σ_q that was tried, or 0; and each σ_q tried with its metric."""
        reference = loss(0.0)
        published = 0.003 if self.metric == "nll" else 0.01
        bound = published if self.tolerance is None else self.tolerance
        sign = 1 if self.metric == "nll" else -1  # what is worse: more NLL, less accuracy
        if self.metric == "nll":
            bound *= reference
        tried = [(0.0, reference)]
        low = 0.0
        high = math.inf
        std = self.start
        for _ in range(self.evaluations):
            value = loss(std)
            tried.append((std, value))
            if sign * (value - reference) <= bound:
                low = std
            else:
                high = std
            if low == 0:  # none is feasible yet
                std = std * 0.25
            elif high == math.inf:  # none is too much yet
                std = std * 2
            else:
                std = math.sqrt(low * high)
        return low, tried
