"""The KL step of BLoB: a callback that takes it after the optimiser's step."""

import logging
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from bayestune.adapters import GaussianLinear, Slots
from bayestune.errors import Refusal
from bayestune.kl.closed_form import kl_divergence, kl_step_, rate_to
from bayestune.kl.schedule import Schedule, burst_period, kl_weights, warmup_decay

logger = logging.getLogger(__name__)

StdOptimizer = Literal["sgd", "adamw"]


class _Plan(NamedTuple):
    """π_t and the learning rates of the KL, and of G on the likelihood, at each step, (T,)."""

    weights: Tensor
    rates: Tensor
    std_rates: Tensor


@dataclass(eq=False)
class KLStep(TrainerCallback):
    """Takes the KL step after the optimiser's, decoupled as AdamW decouples weight decay.

    With η_t = kl_lr·schedule_t·π_t:
    M ← M·(1 − η_t/σ_p²),  G ← G + η_t·(2/G − 2G³/σ_p²) − std_lr·schedule_t·∂NLL/∂G.
    With std_lr = kl_lr it is the authors' two-optimiser update without a second backward pass. With
    `std_optimizer="adamw"` the last term is left to the run's own optimiser.

    Args:
        prior_std: σ_p.
        final_std: the standard deviation the KL should end at; `kl_lr` is solved for.
        kl_lr: the learning rate of the KL; 0.01 as the authors' if `final_std` is not given either.
        schedule: "bursts", the KL arrives at the end of each period; "constant".
        period: P in steps; None takes the authors' from the rows and the batch.
        warmup_ratio: the part of the steps in which `kl_lr` warms up; it then decays to 0.
        std_optimizer: what takes G along the likelihood's gradient: "sgd", at `std_lr`, or "adamw",
            the run's optimiser.
        std_lr: the learning rate of G on the likelihood; None takes `kl_lr`, or 0.01 where
            `final_std` is given (the rate solved for would grow without bound as runs get shorter).
        adapter: which adapter; None for the active one.

    Raises:
        Refusal: if both `final_std` and `kl_lr` are given, or a value is out of range.

    Example:
        With a Trainer: `Trainer(model, ..., callbacks=[KLStep(prior_std=0.2, final_std=0.1)])`.
        In a bare loop: `KLStep(final_std=0.1, period=316).attach(model, adam, total_steps=1000)`.

    Reference:
        Wang, Shi, Han, Metaxas, Wang: BLoB (section 3), NeurIPS 2024,
        https://arxiv.org/abs/2406.11675.
    """

    prior_std: float = 0.2
    final_std: float | None = None
    kl_lr: float | None = None
    schedule: Schedule = "bursts"
    period: int | None = None
    warmup_ratio: float = 0.06
    std_optimizer: StdOptimizer = "sgd"
    std_lr: float | None = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        if self.final_std is not None and self.kl_lr is not None:
            raise Refusal(
                f"give final_std or kl_lr, not both: got final_std={self.final_std} and "
                f"kl_lr={self.kl_lr}; with final_std the rate is solved for"
            )
        if self.std_optimizer not in get_args(StdOptimizer):
            raise Refusal(
                f"unknown std_optimizer: got {self.std_optimizer!r}, expected one of "
                f"{get_args(StdOptimizer)}; correct it"
            )
        if self.prior_std <= 0:
            raise Refusal(f"prior_std must be positive: got {self.prior_std}; 0.2 is usual")
        self.step = 0
        self._plan: _Plan | None = None
        self._layers: list[GaussianLinear] = []
        self._root_stds: list[Any] = []  # their gradients wait for the optimiser
        self._gradients: list[Any] = []
        self._handles: list[Any] = []

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        total_steps: int,
        num_rows: int | None = None,
        batch_size: int | None = None,
        step: int = 0,
    ) -> None:
        """Hooks the KL step to an optimiser; the Trainer does this by itself.

        Args:
            model: a model that `bayesify` has converted.
            optimizer: any torch optimiser of its parameters.
            total_steps: T, the optimiser steps of the whole run.
            num_rows: N, for the authors' period; not needed if `period` is given.
            batch_size: b, likewise.
            step: how many steps are done already.

        Raises:
            Refusal: if the adapter has no Gaussian layer, the period cannot be known, or weight
                decay would act on G.
        """
        slots = Slots(model, self.adapter)
        self._layers = list(slots.of_kind(GaussianLinear).values())
        if not self._layers:
            raise Refusal(
                "the model has no Gaussian layer: got the deterministic adapter "
                f"{slots.adapter!r}; call bayesify(model) first, or name the adapter"
            )
        if self.std_optimizer == "adamw":
            self._refuse_decay(optimizer)
        self.step = step
        self._plan = plan = self._make_plan(total_steps, num_rows, batch_size)
        self.detach()
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps torch's optimiser
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self._before_step()),
            optimizer.register_step_post_hook(lambda *_: self._after_step(plan)),
        ]

    def detach(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _refuse_decay(self, optimizer: torch.optim.Optimizer) -> None:
        root_stds = {id(layer.root_std) for layer in self._layers}
        for group in optimizer.param_groups:
            if group.get("weight_decay") and root_stds & {id(p) for p in group["params"]}:
                raise Refusal(
                    "weight decay would shrink the standard deviation: got "
                    f"weight_decay={group['weight_decay']} on root_std, expected 0; set "
                    'weight_decay=0 or std_optimizer="sgd"'
                )

    def _make_plan(self, total_steps: int, num_rows: int | None, batch_size: int | None) -> _Plan:
        period = self.period
        if period is None:
            if num_rows is None or batch_size is None:
                raise Refusal(
                    "the KL's period is not known: got no period, expected num_rows and "
                    "batch_size, or period; give one of them"
                )
            period = burst_period(num_rows, batch_size)
        if self.schedule == "bursts" and total_steps < period:
            logger.warning(
                "the run of %d steps ends before the first burst of the KL (period %d): it takes "
                'hardly any KL; use schedule="constant", a shorter period, or more steps',
                total_steps,
                period,
            )
        weights = kl_weights(total_steps, period, self.schedule)
        shape = warmup_decay(total_steps, self.warmup_ratio)
        kl_lr = 0.01 if self.kl_lr is None else self.kl_lr
        std_lr = kl_lr if self.std_lr is None else self.std_lr
        if self.final_std is not None:
            start = self._layers[0].init_root_std
            kl_lr = rate_to(self.final_std, (weights * shape).tolist(), self.prior_std, start)
        return _Plan(weights, kl_lr * shape, std_lr * shape)

    def _before_step(self) -> None:
        reached = [layer.root_std for layer in self._layers if layer.root_std.grad is not None]
        if self.step == 0 and not reached:
            raise RuntimeError(
                f"no gradient reached any of the {len(self._layers)} Gaussian layers: something "
                "applies LoRA without calling its modules (a fused kernel?), so the noise would be "
                "lost; switch that kernel off"
            )
        if self.std_optimizer == "sgd":
            self._root_stds = reached
            self._gradients = [root_std.grad for root_std in reached]
            for root_std in reached:
                root_std.grad = None

    def _after_step(self, plan: _Plan) -> None:
        now = self.step
        planned = len(plan.rates)
        self.step += 1
        if now == planned:
            logger.warning(
                "the KL's plan of %d steps is over, but the run goes on: the standard deviation "
                "stays as it is from here; give the KL step the total_steps of the whole run",
                planned,
            )
        if now >= planned:
            return
        means = [layer.weight for layer in self._layers]
        root_stds = [layer.root_std for layer in self._layers]
        step = float(plan.rates[now]) * float(plan.weights[now])
        kl_step_(means, root_stds, step, self.prior_std)
        if self._gradients:
            std_lr = float(plan.std_rates[now])
            with torch.no_grad():
                torch._foreach_add_(self._root_stds, self._gradients, alpha=-std_lr)
            self._gradients = []

    def state_of_kl(self) -> dict[str, float]:
        """What is logged: τ, mean σ/σ_p, the KL in nats, its weight π_t and its learning rate.

        Raises:
            RuntimeError: before the step is attached.
        """
        if self._plan is None:
            raise RuntimeError(
                "the KL step is not attached: got no plan, expected a Trainer that has begun or a "
                "call of attach(model, optimizer, total_steps=…)"
            )
        kl = 0.0
        mean_std = 0.0
        with torch.no_grad():
            for layer in self._layers:
                kl += float(kl_divergence(layer.weight, layer.std, self.prior_std))
                mean_std += float(layer.std.mean()) / len(self._layers)
        weights, rates, _ = self._plan
        last = min(max(self.step - 1, 0), len(rates) - 1)
        return {
            "kl_time": float((weights * rates).cumsum(0)[last]) if self.step else 0.0,
            "std_over_prior": mean_std / self.prior_std,
            "kl": kl,
            "kl_weight": float(weights[last]),
            "kl_lr": float(rates[last]),
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attaches to the Trainer's optimiser, at the step it starts from."""
        dataset: Any = getattr(kwargs.get("train_dataloader"), "dataset", None)
        self.attach(
            kwargs["model"],
            kwargs["optimizer"],
            total_steps=state.max_steps,
            num_rows=len(dataset) if hasattr(dataset, "__len__") else None,
            batch_size=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            step=state.global_step,
        )

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds the KL's state to the log line and to the history."""
        logs = kwargs.get("logs") or {}
        if "loss" in logs:
            values = self.state_of_kl()
            logs.update(values)
            if state.log_history:
                state.log_history[-1].update(values)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detaches."""
        self.detach()
