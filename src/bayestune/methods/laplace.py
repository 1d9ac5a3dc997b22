"""Laplace-LoRA: a Gaussian around a fitted adapter; the likelihood's curvature is its precision."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bayestune.adapters import SIDES
from bayestune.curvature import Curvature, Structure, best_precision, gauss_newton, log_evidence
from bayestune.data import Question
from bayestune.decisions import predictive_nll
from bayestune.errors import COUNT, Refusal, check_fields
from bayestune.forward import Draws
from bayestune.methods.held_out import check_point, held_out_rows
from bayestune.methods.map import MAP
from bayestune.methods.method import Method
from bayestune.methods.unlabelled import unlabelled_of
from bayestune.methods.workplace import refuse_parts_of
from bayestune.posteriors import Linearised, Point, Sampled, gaussian_logits
from bayestune.scoring import Scorer, batches_by_length
from bayestune.training import Meter, Training

GRID = tuple(10.0 ** (power / 2) for power in range(-6, 11))  # λ to choose among on held-out rows
_DRAWS = Draws(1000)  # of the predictive in that choice


@dataclass(frozen=True)
class Laplace:
    """q(θ) = N(θ_MAP, (H + λI)⁻¹) over LoRA's A and B, H the Gauss-Newton matrix block by block.

    Args:
        base: fits θ_MAP; any method that returns a point.
        structure: "kfac" (KFAC-expand, see `bayestune.curvature`) or "diagonal".
        layers: "all", or "last": the output head's adapters, or the last block's if it has none.
        rank_kfac: eigenpairs kept of a Kronecker factor whose side is over 100.
        prior_precision: λ; chosen if None.
        choose: λ by the training rows' Laplace evidence or the held-out rows' linearised NLL.
        predictive: "linearised" (Gaussian logits) or "sampled" (draws of adapters).
        batch_size: rows of one pass with gradients, in the fit and in linearised prediction.

    Raises:
        Refusal: if `prior_precision` is not positive.

    Reference:
        Yang, Robeyns, Wang, Aitchison: Bayesian low-rank adaptation for large language models, ICLR
        2024, https://arxiv.org/abs/2308.13111.
    """

    base: Method = field(default_factory=MAP)
    structure: Structure = "kfac"
    layers: Literal["all", "last"] = "all"
    rank_kfac: int = 10
    prior_precision: float | None = None
    choose: Literal["evidence", "held_out"] = "evidence"
    predictive: Literal["linearised", "sampled"] = "linearised"
    batch_size: int = 4

    def __post_init__(self) -> None:
        check_fields(self, rank_kfac=COUNT, batch_size=COUNT)
        if self.prior_precision is not None and not self.prior_precision > 0:
            raise Refusal(
                f"prior_precision must be positive: got {self.prior_precision}; None chooses it"
            )

    def fit(self, model: nn.Module, scorer: Scorer, training: Training) -> Linearised | Sampled:
        """Fits the base, then the curvature around it."""
        refuse_parts_of("Laplace")
        if self.prior_precision is None and self.choose == "held_out":
            self._held_out(scorer, warns=False)  # refused before the base is fitted
        point = check_point(self.base.fit(model, scorer, training), "Laplace")
        return self.around(point, scorer, bf16=training.bf16)

    def around(self, point: Point, scorer: Scorer, *, bf16: bool = False) -> Linearised | Sampled:
        """The posterior around θ_MAP, an adapter that is fitted already.

        Args:
            point: θ_MAP.
            scorer: of the task whose training rows give the curvature.
            bf16: whether passes run under autocast.
        """
        meter = Meter()
        slots = point.slots
        all_names = slots.names(SIDES)
        names = last_slots(all_names) if self.layers == "last" else all_names
        weights = slots.weights()
        squared_norm = sum(weights[name].double().square().sum().item() for name in names)
        rows = _batches(scorer, scorer.task.train, self.batch_size)
        settings: dict[str, Any] = {"max_rows": self.batch_size, "adapter": point.adapter}
        structure: dict[str, Any] = {"structure": self.structure, "rank": self.rank_kfac}
        with Draws(bf16=bf16).precision(point.model):
            curvature = gauss_newton(slots, scorer, rows, **structure, names=names)
            linearised = Linearised(point.model, scorer, curvature.blocks, 1.0, **settings)
            precision = self._precision(linearised, scorer, curvature, squared_norm)
        family = Sampled if self.predictive == "sampled" else Linearised
        posterior = family(point.model, scorer, curvature.blocks, precision, **settings)
        cost = meter.read()
        chosen = {
            "prior_precision": precision,
            "log_evidence": log_evidence(curvature, squared_norm, precision),
        }
        report = point.report.plus(**cost, laplace_seconds=cost["seconds"], **chosen)
        posterior.report = report
        return posterior

    def _precision(
        self, posterior: Linearised, scorer: Scorer, curvature: Curvature, squared_norm: float
    ) -> float:
        """λ as given, or chosen by the evidence or on the held-out rows."""
        if self.prior_precision is not None:
            return self.prior_precision
        if self.choose == "evidence":
            return best_precision(curvature, squared_norm)
        rows = self._held_out(scorer)
        return best_on_held_out(posterior, _batches(scorer, rows, self.batch_size))

    def _held_out(self, scorer: Scorer, *, warns: bool = True) -> tuple[Question, ...]:
        return held_out_rows(scorer, "Laplace", unlabelled_of(self.base, scorer), warns=warns)


def last_slots(names: Sequence[str]) -> list[str]:
    """The slots of the last layers: of the output head if it is adapted, else of the last block.

    The last name decides: if it has a block's number, all slots of that block are taken.
    """
    numbered = re.match(r".*?\.\d+\.", names[-1])
    prefix = numbered.group() if numbered else names[-1].rpartition(".")[0] + "."
    return [name for name in names if name.startswith(prefix)]


def _batches(scorer: Scorer, rows: Sequence[Question], size: int) -> Iterator[dict[str, Tensor]]:
    return (batch for _, batch in batches_by_length(scorer, scorer.encode(rows), size))


def best_on_held_out(posterior: Linearised, rows: Iterable[dict[str, Tensor]]) -> float:
    """The λ of `GRID` with the smallest NLL of labelled batches; the posterior's own is unused."""
    losses = torch.zeros(len(GRID), dtype=torch.float64)
    for batch in rows:
        labels = batch.pop("labels")
        mean, covariances = posterior.moments(batch, GRID)
        for i, covariance in enumerate(covariances):
            logits = gaussian_logits(mean, covariance, _DRAWS).double().cpu()
            losses[i] += len(labels) * predictive_nll(logits, labels)
    return GRID[int(losses.argmin())]
