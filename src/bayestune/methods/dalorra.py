"""DALorRA: ranks of LoRA that are kept or dropped at random, with probabilities that are learnt."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerCallback

from bayestune.adapters import (
    RankLinear,
    Slots,
    TrainingPasses,
    make_ranks_random,
    put_means,
)
from bayestune.errors import NUMERIC, Refusal, check_fields
from bayestune.posteriors import Scaled
from bayestune.scoring import Scorer
from bayestune.training import Training, adamw, add_to_log, fit_adapter


class GatedLinear(RankLinear):
    """diag(z)·A, z_j ~ Bernoulli(π_j): A (r, k) is `weight`, `gate_logit` (r, 1) is log π/(1 − π).

    In training mode z is relaxed: z = sigmoid((log π/(1 − π) + log u/(1 − u))/τ), u ~ U(0, 1).
    `init_kept` is π at the start, `temperature` is τ; the other arguments are `RankLinear`'s.
    """

    def __init__(
        self, linear: nn.Linear, passes: TrainingPasses, init_kept: float, temperature: float
    ) -> None:
        super().__init__(linear, passes)
        kept = torch.full_like(linear.weight[:, :1], init_kept)
        learnt = linear.weight.requires_grad
        self.gate_logit = nn.Parameter(kept.logit().detach(), requires_grad=learnt)
        self.temperature = temperature

    @property
    def mean_factors(self) -> Tensor:
        """π (r,)."""
        return self.gate_logit.sigmoid()[:, 0]

    def noise(self, num_rows: int) -> Tensor:
        """log u/(1 − u) of each row, (N, r)."""
        like = self.gate_logit
        uniform = torch.rand(num_rows, len(like), dtype=like.dtype, device=like.device)
        return uniform.clamp_(1e-6, 1 - 1e-6).logit()

    def factors(self, noise: Tensor) -> Tensor:
        """A relaxed z for each row, (N, r)."""
        return ((self.gate_logit[:, 0] + noise) / self.temperature).sigmoid()


def gate_kl(logit: Tensor, prior_kept: float) -> Tensor:
    """KL[Bernoulli(π) ‖ Bernoulli(p)] = Σ [π log π/p + (1 − π) log (1 − π)/(1 − p)] in nats."""
    prior = torch.tensor(prior_kept, dtype=logit.dtype, device=logit.device)
    kept = logit.sigmoid()
    of_kept = kept * (F.logsigmoid(logit) - prior.log())
    of_dropped = (1 - kept) * (F.logsigmoid(-logit) - (-prior).log1p())
    return (of_kept + of_dropped).sum()


@torch.no_grad()
def gate_kl_gradient(logit: Tensor, prior_kept: float) -> Tensor:
    """The gradient of `gate_kl` in the logits: π(1 − π)·(logit π − logit p)."""
    kept = logit.sigmoid()
    return kept * (1 - kept) * (logit - torch.tensor(prior_kept, dtype=logit.dtype).logit())


@dataclass(eq=False)
class GateKL(TrainerCallback):
    """Adds the KL's gradient, times its weight, to the likelihood's before each optimiser step."""

    prior_kept: float
    weight: float

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finds the gates."""
        layers = Slots(kwargs["model"]).of_kind(GatedLinear)
        self.logits: list[Tensor] = [layer.gate_logit for layer in layers.values()]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds to the gradients of the likelihood."""
        for logit in self.logits:
            gradient = gate_kl_gradient(logit, self.prior_kept) * self.weight
            logit.grad = gradient if logit.grad is None else logit.grad + gradient

    @torch.no_grad()
    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Adds the KL and the mean of π."""
        if "loss" in logs:
            kl = sum(float(gate_kl(logit, self.prior_kept)) for logit in self.logits)
            mean_kept = torch.cat(self.logits).sigmoid().mean().item()
            add_to_log(state, logs, {"kl": kl, "mean_kept": mean_kept})


@dataclass(frozen=True)
class DALorRA:
    """ΔW = (α/r)·B·diag(z)·A with z_j ~ Bernoulli(π_j) for each rank; A, B and π are trained.

    Published are the relaxation, the learning rate of π and the exact KL. The other defaults are
    this package's choices. Each row has a z of its own.

    Args:
        gate_lr: the learning rate of π's logits, at its peak.
        prior_kept: the prior's probability to keep a rank, in (0, 1).
        init_kept: π at the start, in (0, 1).
        temperature: of the relaxation.
        kl_weight: of the KL beside the mean loss; None for 1/(training rows), the evidence's bound.

    Raises:
        Refusal: if a value is out of range.

    Reference:
        Zhang, Ren, Zhang, Guo: Bayesian sparse low-rank adaptation for large language model
        uncertainty estimation, 2026, https://arxiv.org/abs/2607.02182.
    """

    gate_lr: float = 1e-2
    prior_kept: float = 0.5
    init_kept: float = 0.5
    temperature: float = 0.5
    kl_weight: float | None = None

    def __post_init__(self) -> None:
        check_fields(self, gate_lr=NUMERIC, temperature=NUMERIC, kl_weight=NUMERIC)
        inside = 0 < self.prior_kept < 1 and 0 < self.init_kept < 1
        if not inside or self.gate_lr < 0 or self.temperature <= 0 or (self.kl_weight or 0) < 0:
            raise Refusal(
                f"out of range: got {self}, expected prior_kept and init_kept in (0, 1), "
                "temperature > 0, gate_lr and kl_weight ≥ 0; correct it"
            )

    def fit(self, model: nn.Module, scorer: Scorer, training: Training) -> Scaled:
        """Trains an adapter and its gates; the mean is π ∘ A."""
        weight = 1 / len(scorer.task.train) if self.kl_weight is None else self.kl_weight
        kl = GateKL(self.prior_kept, weight)
        optimizer = adamw(training, ["gate_logit"], self.gate_lr)
        make = partial(GatedLinear, init_kept=self.init_kept, temperature=self.temperature)
        prepare = partial(make_ranks_random, make=make)
        adapted, report = fit_adapter(
            model, scorer, training, [kl], prepare=prepare, optimizer=optimizer
        )
        layers = Slots(adapted).of_kind(GatedLinear)
        put_means(adapted, layers)
        probabilities = {name: layer.mean_factors[:, None] for name, layer in layers.items()}
        factors = {name: p.detach().clamp_min(1e-6) for name, p in probabilities.items()}
        return Scaled(adapted, scorer, factors, "bernoulli", report=report)
