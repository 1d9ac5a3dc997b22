"""ScalaBL: Gaussian factors on the ranks of A, in the basis of A's singular vectors."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from bayestune.adapters import RankLinear, Slots, TrainingPasses, make_ranks_random, put_means
from bayestune.errors import NUMERIC, Refusal, check_fields
from bayestune.kl import Schedule, burst_period, kl_decay, kl_weights
from bayestune.posteriors import Scaled
from bayestune.scoring import Scorer
from bayestune.training import Training, adamw, add_to_log, fit_adapter


class SingularLinear(RankLinear):
    """A = diag(s)·V, s ~ N(μ, diag σ²): V (r, k) is `weight`, log μ and log σ (r, 1) are learnt.

    Of the plain layer's weight U·diag(μ)·V, μ and V are kept, and U, which turns the ranks, is not.
    With ε the `init_std`, σ starts uniform on (ε/√2, ε). A may not have more ranks than inputs.
    """

    def __init__(self, linear: nn.Linear, passes: TrainingPasses, init_std: float) -> None:
        if linear.out_features > linear.in_features:
            raise Refusal(
                f"A has more ranks than inputs: got ({linear.out_features}, {linear.in_features}), "
                f"expected at most rank {linear.in_features}; lower the rank"
            )
        super().__init__(linear, passes)
        with torch.no_grad():
            _, values, directions = torch.linalg.svd(linear.weight.float(), full_matrices=False)
            self.weight.copy_(directions)
            std = torch.empty_like(values).uniform_(init_std / math.sqrt(2), init_std)
        learnt = linear.weight.requires_grad
        self.log_mean = nn.Parameter(values.log()[:, None], requires_grad=learnt)
        self.log_std = nn.Parameter(std.log()[:, None], requires_grad=learnt)

    @property
    def mean_factors(self) -> Tensor:
        """μ (r,)."""
        return self.log_mean.exp()[:, 0]

    def noise(self, num_rows: int) -> Tensor:
        """ε of each row, (N, r)."""
        like = self.log_std
        return torch.randn(num_rows, len(like), dtype=like.dtype, device=like.device)

    def factors(self, noise: Tensor) -> Tensor:
        """s = μ + σ∘ε for each row, (N, r)."""
        return torch.addcmul(self.mean_factors, self.log_std.exp()[:, 0], noise)


def factor_kl(log_mean: Tensor, log_std: Tensor) -> Tensor:
    """KL[N(μ, σ²) ‖ N(0, 1)] = Σ [(σ² + μ² − 1)/2 − log σ] in nats, of log μ and log σ."""
    return (((2 * log_std).exp() + (2 * log_mean).exp() - 1) / 2 - log_std).sum()


@torch.no_grad()
def factor_kl_step_(log_mean: Tensor, log_std: Tensor, step: float) -> None:
    """One gradient step on `factor_kl`, in place: ∂/∂log μ = μ², ∂/∂log σ = σ² − 1."""
    log_mean.sub_((2 * log_mean).exp(), alpha=step)
    log_std.sub_((2 * log_std).exp() - 1, alpha=step)


@dataclass(eq=False)
class FactorKL(TrainerCallback):
    """A step of η_t = kl_lr·schedule_t·π_t on the KL after each of the optimiser's, as in BLoB."""

    kl_lr: float
    schedule: Schedule
    num_rows: int
    warmup_ratio: float

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finds the layers and plans the steps."""
        self.layers = list(Slots(kwargs["model"]).of_kind(SingularLinear).values())
        batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        period = burst_period(self.num_rows, batch_size)
        weights = kl_weights(state.max_steps, period, self.schedule)
        decay = kl_decay(state.max_steps, self.schedule, self.warmup_ratio)
        self.steps = self.kl_lr * weights * decay

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes the KL's step."""
        for layer in self.layers:
            factor_kl_step_(layer.log_mean, layer.log_std, float(self.steps[state.global_step]))

    @torch.no_grad()
    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Adds the KL."""
        if "loss" in logs:
            kl = sum(float(factor_kl(layer.log_mean, layer.log_std)) for layer in self.layers)
            add_to_log(state, logs, {"kl": kl})


@dataclass(frozen=True)
class ScalaBL:
    """q(s) = N(μ, diag σ²) on an r-vector of each layer, A = diag(s)·V; V, B, μ and σ are trained.

    As published: μ and V start from the singular value decomposition of PEFT's A, μ and σ are
    learnt as logarithms, AdamW trains all parameters, V too, on the likelihood, and the KL has
    steps of its own, with BLoB's schedule. Unlike in the public code, the KL is KL[q ‖ p] and not
    KL[p ‖ q], and each row has a draw of its own.

    Args:
        init_std: ε; σ starts uniform on (ε/√2, ε).
        kl_lr: the learning rate of the KL.
        schedule: of the KL, "bursts", "constant" or "early", see `KLStep`.

    Raises:
        Refusal: if a value is out of range.

    Reference:
        Samplawski, Cobb, Acharya, Kaur, Jha: Scalable Bayesian low-rank adaptation of large
        language models via stochastic variational subspace inference, UAI 2025,
        https://arxiv.org/abs/2506.21408.
    """

    init_std: float = 0.05
    kl_lr: float = 0.2
    schedule: Schedule = "bursts"

    def __post_init__(self) -> None:
        check_fields(self, init_std=NUMERIC, kl_lr=NUMERIC)
        if self.init_std <= 0 or self.kl_lr < 0:
            raise Refusal(
                f"out of range: got {self}, expected init_std > 0 and kl_lr ≥ 0; correct it"
            )

    def fit(self, model: nn.Module, scorer: Scorer, training: Training) -> Scaled:
        """Trains an adapter and its factors; the mean is μ ∘ V."""
        kl = FactorKL(self.kl_lr, self.schedule, len(scorer.task.train), training.warmup_ratio)
        optimizer = adamw(training, ["log_mean", "log_std"], training.learning_rate)
        make = partial(SingularLinear, init_std=self.init_std)
        prepare = partial(make_ranks_random, make=make)
        adapted, report = fit_adapter(
            model, scorer, training, [kl], prepare=prepare, optimizer=optimizer
        )
        layers = Slots(adapted).of_kind(SingularLinear)
        put_means(adapted, layers)
        stds = {name: layer.log_std.detach().exp() for name, layer in layers.items()}
        directions = {name: layer.weight.detach() for name, layer in layers.items()}
        return Scaled(adapted, scorer, stds, "normal", directions, report=report)
