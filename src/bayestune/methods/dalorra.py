"""DALorRA: ranks of LoRA that are kept or dropped at random, each with a probability that is learnt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerCallback

from bayestune.adapters import RankLinear, RowGroups, make_ranks_random, put_means
from bayestune.posteriors import Scaled
from bayestune.scoring import Scorer
from bayestune.training import Training, adamw, start_adapter, train


class GatedLinear(RankLinear):
    """diag(z)·A, z_j ~ Bernoulli(π_j): A (r, k) is `weight`, `gate_logit` (r, 1) is log π/(1 − π).

    In training mode z is relaxed: z = sigmoid((log π/(1 − π) + log u/(1 − u))/τ), u uniform on (0, 1).

    Args:
        linear: the plain layer whose weight is taken, the same Parameter.
        init_kept: π at the start.
        temperature: τ.
        groups: shared by a model's layers, see `RowGroups`.
    """

    def __init__(
        self,
        linear: nn.Linear,
        init_kept: float = 0.5,
        temperature: float = 0.5,
        groups: RowGroups | None = None,
    ) -> None:
        super().__init__(linear, groups)
        kept = torch.full_like(linear.weight[:, :1], init_kept)
        self.gate_logit = nn.Parameter(
            kept.logit().detach(), requires_grad=linear.weight.requires_grad
        )
        self.temperature = temperature

    @property
    def mean_factors(self) -> Tensor:
        """π (r,)."""
        return self.gate_logit.sigmoid()[:, 0]

    def factors(self, num_rows: int) -> Tensor:
        """A relaxed z for each row, (N, r)."""
        uniform = torch.rand(
            num_rows, self.out_features, dtype=self.gate_logit.dtype, device=self.gate_logit.device
        )
        noise = uniform.clamp_(1e-6, 1 - 1e-6).logit()
        return ((self.gate_logit[:, 0] + noise) / self.temperature).sigmoid()


def kl_divergence(logit: Tensor, prior_kept: float) -> Tensor:
    """KL[Bernoulli(π) ‖ Bernoulli(p)] = Σ [π log(π/p) + (1 − π) log((1 − π)/(1 − p))] in nats, of π's logits."""
    prior = torch.tensor(prior_kept, dtype=logit.dtype, device=logit.device)
    kept = logit.sigmoid()
    return (
        kept * (F.logsigmoid(logit) - prior.log())
        + (1 - kept) * (F.logsigmoid(-logit) - (-prior).log1p())
    ).sum()


@torch.no_grad()
def kl_gradient(logit: Tensor, prior_kept: float) -> Tensor:
    """The gradient of that KL in the logits: π(1 − π)·(logit π − logit p)."""
    kept = logit.sigmoid()
    return kept * (1 - kept) * (logit - torch.tensor(prior_kept, dtype=logit.dtype).logit())


class _AddKL(TrainerCallback):
    """Adds the KL's gradient, by its weight, to that of the likelihood before each step of the optimiser."""

    def __init__(self, layers: Sequence[GatedLinear], prior_kept: float, weight: float) -> None:
        self.layers, self.prior_kept, self.weight = layers, prior_kept, weight

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for layer in self.layers:
            gradient = kl_gradient(layer.gate_logit, self.prior_kept) * self.weight
            before = layer.gate_logit.grad
            layer.gate_logit.grad = gradient if before is None else before + gradient

    @torch.no_grad()
    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            kl = sum(
                float(kl_divergence(layer.gate_logit, self.prior_kept)) for layer in self.layers
            )
            kept = torch.cat([layer.mean_factors for layer in self.layers]).mean().item()
            values = {"kl": kl, "mean_kept": kept}
            logs.update(values)
            state.log_history[-1].update(values)


@dataclass(frozen=True)
class DALorRA:
    """ΔW = (α/r)·B·diag(z)·A with z_j ~ Bernoulli(π_j) for each rank of each layer; A, B and π are trained together.

    Published are the relaxation, the learning rate of π and the exact KL. The prior, where π starts, the temperature
    and the KL's weight were not at hand: a fair coin, the prior, 1/2, and the weight that makes the objective the
    evidence's lower bound are this package's choices. Each row has a z of its own.

    Args:
        gate_lr: the learning rate of π's logits, at its peak.
        prior_kept: the prior's probability to keep a rank, in (0, 1).
        init_kept: π at the start, in (0, 1).
        temperature: of the relaxation.
        kl_weight: of the KL beside the mean loss; None for one over the number of training rows.

    Raises:
        ValueError: if a value is out of range.

    Reference:
        Zhang, Ren, Zhang, Guo: Bayesian sparse low-rank adaptation for large language model uncertainty estimation,
        2026, https://arxiv.org/abs/2607.02182.
    """

    gate_lr: float = 1e-2
    prior_kept: float = 0.5
    init_kept: float = 0.5
    temperature: float = 0.5
    kl_weight: float | None = None

    def __post_init__(self) -> None:
        inside = 0 < self.prior_kept < 1 and 0 < self.init_kept < 1
        if not inside or self.gate_lr < 0 or self.temperature <= 0 or (self.kl_weight or 0) < 0:
            raise ValueError(
                f"out of range: got {self}, expected prior_kept and init_kept in (0, 1), temperature > 0, gate_lr and "
                "kl_weight ≥ 0; correct it"
            )

    def fit(self, model: nn.Module, scorer: Scorer, training: Training) -> Scaled:
        """Trains a fresh adapter on `model`; its mean is π ∘ A.

        Args:
            model: a transformers model without adapters.
            scorer: the task, bound to the model's tokenizer.
            training: the adapter and how it is trained.
        """
        adapted = start_adapter(model, training)
        layers = make_ranks_random(
            adapted,
            lambda slot, groups: GatedLinear(slot, self.init_kept, self.temperature, groups),
        )
        weight = 1 / len(scorer.task.train) if self.kl_weight is None else self.kl_weight
        add_kl = _AddKL(list(layers.values()), self.prior_kept, weight)
        optimizer = adamw(training, [layer.gate_logit for layer in layers.values()], self.gate_lr)
        report = train(adapted, scorer, training, [add_kl], optimizer=optimizer)
        put_means(adapted, layers)
        kept = {
            name: layer.mean_factors.detach()[:, None].clamp_min(1e-6)
            for name, layer in layers.items()
        }
        return Scaled(adapted, scorer, kept, "bernoulli", report=report)
