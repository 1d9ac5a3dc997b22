"""The KL step of BLoB: a callback that takes it after the optimiser's step."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import TrainerCallback

from bayestune.errors import Refusal
from bayestune.kl.closed_form import points_of, refuse_long_steps
from bayestune.kl.plan import AUTHORS_KL_LR, Aim, Plan
from bayestune.kl.run import KLRun, Progress
from bayestune.kl.schedule import Schedule, burst_period, check_schedule
from bayestune.kl.surroundings import (
    check_optimizer,
    gaussian_layers,
    put_first,
    rows_of,
    whole_value,
    with_trained_std,
)
from bayestune.kl.trainer_runs import begin_run, end_run, rows_of_a_step
from bayestune.kl.undoing import inner_optimizer
from bayestune.kl.zero_optimizer import is_zero
from bayestune.kl.zero_run import ZeroRun

StdOptimizer = Literal["sgd", "adamw"]


@dataclass(eq=False)
class KLStep(TrainerCallback):
    """Takes the KL step after the optimiser's, decoupled as AdamW decouples weight decay.

    With η_t = kl_lr·schedule_t·π_t:
    M ← M·(1 − η_t/σ_p²),  G ← G + η_t·(2/G − 2G³/σ_p²) − std_lr·decay_t·∂NLL/∂G.
    With kl_lr, std_lr and bursts it is the authors' two-optimiser update without a second backward
    pass. With `std_optimizer="adamw"` the last term is left to the run's own optimiser. Parameters
    in bfloat16 or float16 take the step in float32. What is frozen is not moved.

    Args:
        prior_std: σ_p.
        final_std: the standard deviation to end at; the KL's learning rate is solved for, from the
            layers' present one. None takes half of `prior_std`, unless `kl_lr`, `period` or bursts
            are given.
        kl_lr: the learning rate of the KL, instead of `final_std`; with neither the authors' 0.01.
        schedule: "constant", at the decaying learning rate, so that three quarters of the KL are
            taken by half time; "early", nine tenths by a third; "bursts", at the end of each
            period. None takes "constant", or the authors' "bursts" if `kl_lr` or `period` is given.
        period: P in steps; None takes the authors' from the rows and the batch. With `final_std` it
            matters for bursts only.
        warmup_ratio: the part of the steps in which `kl_lr` warms up.
        std_optimizer: what takes G along the likelihood's gradient: "sgd", at `std_lr`, or "adamw",
            the run's optimiser.
        std_lr: the learning rate of G on the likelihood, with warm-up and linear decay; None takes
            `kl_lr`, or 0.01 where `final_std` holds (the rate solved for would grow without bound
            as runs get shorter).
        adapter: which adapter; None for the active Gaussian one.

    Raises:
        Refusal: if both `final_std` and `kl_lr` are given, or a value is out of range.

    Example:
        With a Trainer: `Trainer(model, ..., callbacks=[KLStep(prior_std=0.2, final_std=0.1)])`.
        In a bare loop: `KLStep(final_std=0.1).attach(model, adam, total_steps=1000)`.

    Reference:
        Wang, Shi, Han, Metaxas, Wang: BLoB (section 3), NeurIPS 2024,
        https://arxiv.org/abs/2406.11675.
    """

    prior_std: float = 0.2
    final_std: float | None = None
    kl_lr: float | None = None
    schedule: Schedule | None = None
    period: int | None = None
    warmup_ratio: float = 0.06
    std_optimizer: StdOptimizer = "sgd"
    std_lr: float | None = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        self._aim = Aim.of(
            self.prior_std, self.final_std, self.kl_lr, self.schedule, period=self.period
        )
        self._aim.check()
        check_schedule(self._aim.schedule)
        if self.std_optimizer not in get_args(StdOptimizer):
            raise Refusal(
                f"unknown std_optimizer: got {self.std_optimizer!r}, expected one of "
                f"{get_args(StdOptimizer)}; correct it"
            )
        rates = [rate for rate in (self.kl_lr, self.std_lr) if rate is not None]
        period = self.period is None or self.period >= 1
        if not (period and 0 <= self.warmup_ratio <= 1 and all(rate >= 0 for rate in rates)):
            raise Refusal(
                f"out of range: got {self}, expected kl_lr and std_lr ≥ 0, period ≥ 1 and "
                "warmup_ratio in [0, 1]; correct it"
            )
        self._run: KLRun | None = None
        self._saved: Mapping[str, Any] | None = None

    @property
    def step(self) -> int:
        """How many steps are done."""
        return self._run.step if self._run else 0

    def attach(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        total_steps: int,
        num_rows: int | None = None,
        batch_size: int | None = None,
        step: int | None = None,
    ) -> None:
        """Hooks the KL step to an optimiser; the Trainer does this by itself.

        Args:
            model: a model that `bayesify` has converted.
            optimizer: a torch optimiser of its parameters that goes on from their values.
            total_steps: T, the optimiser steps of the whole run.
            num_rows: N, for the authors' period; needed with `kl_lr` or bursts without `period`.
            batch_size: b, likewise.
            step: how many steps are done already; None for those of a loaded state, or 0.

        Raises:
            Refusal: if the adapter has no Gaussian layer, the period cannot be known, the
                optimiser does not hold G, would decay it or takes the KL step back, σ is beyond
                `final_std`, or so few steps take it there that one overshoots.
        """
        self.detach()
        layers = gaussian_layers(model, self.adapter)
        if not is_zero(optimizer):
            optimizer = inner_optimizer(optimizer)
        moves = self.std_optimizer == "sgd"
        check_optimizer(optimizer, layers, moves_root_std=not moves)
        saved = self._saved or {}
        step = int(saved.get("step", 0)) if step is None else step
        period = self._period(total_steps, num_rows, batch_size)
        trained = with_trained_std(layers).values()
        points = points_of([whole_value(layer.root_std) for layer in trained])
        self._settings = [*self._aim, self.warmup_ratio, period, total_steps]
        self._shape = self._plan_before_rate(total_steps, period)
        self._rate = self._rate_to_final_std(points, step)
        plan = self._shape.times(self._rate)
        refuse_long_steps((plan.weights * plan.rates)[step:].tolist(), self.prior_std, points)
        self._saved = None
        progress = Progress(step, saved.get("kl_time", plan.kl_time(step)), saved.get("owed", ()))
        kind = ZeroRun if is_zero(optimizer) else KLRun
        self._run = kind(layers, plan, self.prior_std, progress, moves_root_std=moves)
        self._run.hook(optimizer)

    def __getstate__(self) -> dict[str, Any]:
        """A copy is not attached, because an optimiser's copy has no hooks.

        Its next `attach` goes on where this run is, or begins anew if the run is over.
        """
        saved = self._saved
        if self._run:
            saved = None if self._run.is_over else self.state_dict()
        return {**vars(self), "_run": None, "_saved": saved}

    def detach(self) -> None:
        """Takes the hooks off."""
        if self._run is not None:
            self._run.unhook()

    def state_dict(self) -> dict[str, Any]:
        """What resumes a run exactly: plain numbers, which a Trainer's checkpoints hold."""
        run = self._attached()
        return {
            "settings": self._settings,
            "rate": self._rate,
            "step": run.step,
            "kl_time": run.kl_time,
            "owed": run.owed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes from what `state_dict` gave: the attached run, or else the next one.

        Raises:
            Refusal: if the run that is attached has other settings.
        """
        if self._run is None or not self._run.is_hooked:
            self._saved = dict(state)
            return
        if list(state["settings"]) != self._settings:
            raise Refusal(
                f"the KL step is attached with other settings: got {list(state['settings'])}, "
                f"expected {self._settings}; give it those, or load the state before attach"
            )
        self._rate = state["rate"]
        progress = Progress(state.get("step", self._run.step), state["kl_time"], state["owed"])
        self._run.go_on(self._shape.times(self._rate), progress)

    def _period(self, total_steps: int, num_rows: int | None, batch_size: int | None) -> int:
        if self.period is not None:
            return self.period
        if num_rows is not None and batch_size is not None:
            return burst_period(num_rows, batch_size)
        if self._aim.final_std is None or self._aim.schedule == "bursts":
            raise Refusal(
                "the KL's period is not known: got no period, expected num_rows and batch_size, or "
                "period; give one of them, or final_std without bursts"
            )
        return max(1, total_steps)  # it does not matter: the rate is solved for

    def _plan_before_rate(self, total_steps: int, period: int) -> Plan:
        """The plan at `kl_lr`, or at rate 1 where the rate is solved for."""
        plan = self._aim.plan(total_steps, period, self.warmup_ratio)
        kl_lr = AUTHORS_KL_LR if self.kl_lr is None else self.kl_lr
        std_rates = plan.std_rates * (kl_lr if self.std_lr is None else self.std_lr)
        return plan._replace(std_rates=std_rates)

    def _rate_to_final_std(self, points: Sequence[float], step: int) -> float:
        """The rate that ends at `final_std`: a resumed run's own, or solved for; else 1."""
        if self._aim.final_std is None:
            return 1.0
        if self._saved is not None and self._saved["settings"] == self._settings:
            return self._saved["rate"]
        return self._aim.solved(self._shape, points, step)

    def _attached(self) -> KLRun:
        if self._run is None:
            raise RuntimeError(
                "the KL step is not attached: got no plan, expected a Trainer that has begun or a "
                "call of attach(model, optimizer, total_steps=…)"
            )
        return self._run

    def state_of_kl(self) -> dict[str, float]:
        """What is logged: τ, mean σ/σ_p, the KL in nats, its weight π_t and its learning rate.

        Where layers are spread over processes (FSDP2), all of these must call it.

        Raises:
            RuntimeError: before the step is attached.
        """
        return self._attached().state()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attaches to the Trainer's optimiser, at the step it starts from.

        Until the run ends, the two sides of a preference share their draw in TRL's trainers, and
        passes without gradients, such as those of a reference or a sampling policy, use the mean.
        """
        put_first(self, sys._getframe(1))
        self.detach()
        saved = state.stateful_callbacks.get(self._state_name)
        if not state.global_step:
            self._saved = None
        elif saved is not None:
            self._saved = saved["attributes"]
        self.attach(
            kwargs["model"],
            kwargs["optimizer"],
            total_steps=state.max_steps,
            num_rows=rows_of(kwargs.get("train_dataloader")),
            batch_size=rows_of_a_step(args, state),
            step=state.global_step,
        )
        begin_run(args, kwargs["model"], kwargs.get("train_dataloader"))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keeps the KL of a step that a gradient scaler skipped for the next; stores its state."""
        self._attached().catch_up(state.global_step)
        state.stateful_callbacks[self._state_name] = {"args": {}, "attributes": self.state_dict()}

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds the KL's state to the log line and to the history.

        Where the trainer logs the same name, such as "kl" for a policy's distance from its
        reference, the posterior's gets a prefix: "posterior_kl".
        """
        logs = kwargs.get("logs") or {}
        if "loss" in logs:
            values = {}
            for name, value in self.state_of_kl().items():
                values[f"posterior_{name}" if name in logs else name] = value
            logs.update(values)
            if state.log_history:
                state.log_history[-1].update(values)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detaches."""
        run = self._attached()
        self.detach()
        end_run(args, kwargs["model"], run, self._aim.final_std)

    @property
    def _state_name(self) -> str:
        """Its name among the callbacks' states in a checkpoint."""
        return f"KLStep, adapter {self.adapter}"
