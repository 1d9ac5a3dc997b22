"""Maximum a posteriori: plain LoRA with weight decay, or with a Gaussian prior of a given scale."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from bayestune.adapters import Slots
from bayestune.errors import NUMERIC, Refusal, check_fields
from bayestune.posteriors import Point
from bayestune.scoring import Scorer
from bayestune.training import Training, fit_adapter


@dataclass(eq=False)
class GaussianPrior(TrainerCallback):
    """Adds the gradient of −log p(θ)/N, θ/(N σ_p²), for p(θ) = N(0, σ_p²) on each entry of A and B.

    The loss is the mean of −log p(answer) over N rows: the sum is −log posterior over N.
    """

    prior_std: float
    num_rows: int

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finds A and B."""
        slots = Slots(kwargs["model"]).modules()
        self.weights = [slot.get_parameter("weight") for slot in slots.values()]

    @torch.no_grad()
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds to the gradients of the likelihood."""
        precision = 1 / (self.num_rows * self.prior_std**2)
        for weight in self.weights:
            if weight.grad is not None:
                weight.grad.add_(weight, alpha=precision)


@dataclass(frozen=True)
class MAP:
    """Plain LoRA with a prior on A and B: θ = argmax log p(D | θ) + log p(θ).

    Args:
        weight_decay: of AdamW, decoupled: θ ← θ·(1 − lr·weight_decay) each step; the paper's MAP.
        prior_std: σ_p of an explicit prior N(0, σ_p²) instead, see `GaussianPrior`.

    Raises:
        Refusal: if `prior_std` is not positive, or `weight_decay` is negative.

    Reference:
        Wang et al.: BLoB, NeurIPS 2024, https://arxiv.org/abs/2406.11675, table 1.
    """

    weight_decay: float = 1e-5
    prior_std: float | None = None

    def __post_init__(self) -> None:
        check_fields(self, weight_decay=NUMERIC, prior_std=NUMERIC)
        if self.weight_decay < 0 or (self.prior_std is not None and self.prior_std <= 0):
            raise Refusal(
                f"a prior has a positive scale: got weight_decay={self.weight_decay}, "
                f"prior_std={self.prior_std}; expected weight_decay >= 0 or prior_std > 0"
            )

    def fit(self, model: nn.Module, scorer: Scorer, training: Training) -> Point:
        """Trains an adapter; the prior takes the place of the training's weight decay."""
        decay = self.weight_decay
        prior = []
        if self.prior_std is not None:
            decay = 0.0
            prior = [GaussianPrior(self.prior_std, len(scorer.task.train))]
        training = replace(training, weight_decay=decay)
        adapted, report = fit_adapter(model, scorer, training, prior)
        return Point(adapted, scorer, report=report)
