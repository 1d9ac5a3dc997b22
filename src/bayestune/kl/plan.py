"""The plan of a run's KL steps: what is aimed at, and the rate that takes σ there."""

import logging
import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from bayestune.errors import Refusal
from bayestune.kl.closed_form import rate_to, std_after_steps
from bayestune.kl.schedule import Schedule, kl_decay, kl_weights, warmup_decay

logger = logging.getLogger(__name__)

AUTHORS_KL_LR = 0.01
_ALLOWED_OVER = 1.05  # a σ above final_std by no more than this factor counts as there


class Plan(NamedTuple):
    """What scales the KL and the likelihood at each step of a run, (T,) each."""

    weights: Tensor  # π_t of the KL
    rates: Tensor  # the KL's learning rates
    std_rates: Tensor  # the learning rates of G on the likelihood

    def size(self, step: int) -> float:
        """η of a step."""
        return float(self.rates[step]) * float(self.weights[step])

    def kl_time(self, step: int) -> float:
        """τ, the sum of the η, after the first `step` steps."""
        return float((self.weights * self.rates)[:step].sum())

    def times(self, rate: float) -> "Plan":
        """The plan with the KL's learning rates multiplied by `rate`."""
        return self._replace(rates=self.rates * rate)


class Aim(NamedTuple):
    """Where the KL should take σ, or the rate at which it is taken, and the schedule.

    Attributes:
        prior_std: σ_p.
        final_std: the σ to end at; None if `kl_lr` holds instead.
        kl_lr: the learning rate of the KL; None if it is solved for, or the authors' is taken.
        schedule: of the KL's steps.
    """

    prior_std: float
    final_std: float | None
    kl_lr: float | None
    schedule: Schedule

    @classmethod
    def of(
        cls,
        prior_std: float,
        final_std: float | None,
        kl_lr: float | None,
        schedule: Schedule | None,
        *,
        share: float = 0.5,
        period: int | None = None,
    ) -> "Aim":
        """The aim of settings, some of which may be left open, as None.

        `kl_lr` or `period`, the authors' settings, bring the authors' bursts; else the schedule is
        "constant". Without these and bursts, `final_std` is a share of `prior_std`.

        Args:
            prior_std: σ_p.
            final_std: the σ to end at.
            kl_lr: the learning rate of the KL.
            schedule: of the KL's steps.
            share: `final_std` as a share of `prior_std` where it is left open.
            period: P in steps.
        """
        as_authors = kl_lr is not None or period is not None
        if schedule is None:
            schedule = "bursts" if as_authors else "constant"
        if final_std is None and not as_authors and schedule != "bursts":
            final_std = share * prior_std
        return cls(prior_std, final_std, kl_lr, schedule)

    def check(self) -> None:
        """Refuses a prior or a σ out of range, and a σ and a rate at once."""
        if not (self.prior_std > 0 and math.isfinite(self.prior_std)):
            raise Refusal(f"prior_std must be positive: got {self.prior_std}; 0.2 is usual")
        if isinstance(self.final_std, str):
            raise Refusal(
                f"final_std must be a number here: got {self.final_std!r}, expected 0.1 or another "
                'below prior_std; "auto" fits the rows several times, as BLoB(final_std="auto") '
                "and `fit --blob.final_std auto` do"
            )
        if self.final_std is not None and self.kl_lr is not None:
            raise Refusal(
                f"give final_std or kl_lr, not both: got final_std={self.final_std} and "
                f"kl_lr={self.kl_lr}; with final_std the rate is solved for"
            )
        if self.final_std is not None and not 0 < self.final_std < self.prior_std:
            raise Refusal(
                f"final_std must lie below prior_std: got final_std={self.final_std}, expected "
                f"0 < final_std < {self.prior_std}; choose a smaller final_std or a larger "
                "prior_std"
            )

    def plan(self, total_steps: int, period: int, warmup_ratio: float) -> Plan:
        """The plan of a run at `kl_lr`, or at rate 1 where the rate is yet to be solved for.

        Args:
            total_steps: T, the optimiser steps of the run.
            period: P in steps.
            warmup_ratio: the part of the steps in which the learning rates warm up.
        """
        if self.schedule == "bursts" and total_steps < period:
            self._warn_of_short_run(total_steps, period)
            if self.final_std is not None:  # the same proportions, and nothing underflows
                period = total_steps
        weights = kl_weights(total_steps, period, self.schedule)
        rates = kl_decay(total_steps, self.schedule, warmup_ratio)
        if self.final_std is None:
            rates *= AUTHORS_KL_LR if self.kl_lr is None else self.kl_lr
        return Plan(weights, rates, warmup_decay(total_steps, warmup_ratio))

    def solved(self, plan: Plan, roots: Sequence[float], step: int) -> float:
        """The rate at which the remaining steps of a plan take σ to `final_std`.

        Args:
            plan: of the run, at rate 1.
            roots: entries of G now, see `points_of`.
            step: how many steps are done.

        Raises:
            Refusal: if σ lies above `final_std`, or no step remains.
        """
        final_std = self.final_std or 0.0
        start = std_after_steps([], self.prior_std, roots)
        if start > _ALLOWED_OVER * final_std:
            raise Refusal(
                f"final_std lies below the standard deviation that is there: got final_std="
                f"{final_std}, expected at least {start:.3g}, because the KL only takes it "
                "upwards to prior_std; set a larger final_std, start from a fresh bayesify, or "
                "scale the draws of the finished posterior with PosteriorScale"
            )
        if start >= (1 - 1e-3) * final_std:
            if step == 0:
                logger.warning(
                    "the standard deviation is at final_std (%.4g) already: the KL has nothing "
                    "left to take, so it moves neither the standard deviation nor the mean",
                    final_std,
                )
            return 0.0
        remaining = (plan.weights * plan.rates)[step:]
        if not remaining.sum() > 0:
            raise Refusal(
                f"no step is left to the KL: got {len(plan.rates)} steps, of which {step} are "
                "done and the others have no learning rate, expected more; train for more steps "
                "or warm up for fewer"
            )
        largest = float(remaining.max())
        return rate_to(final_std, (remaining / largest).tolist(), self.prior_std, roots) / largest

    def _warn_of_short_run(self, total_steps: int, period: int) -> None:
        if self.final_std is None:
            share = math.exp((total_steps - period) * math.log(2))  # weights double in each step
            effect = f"it takes {share:.2g} of one KL"
        else:  # in the KL time τ = σ_p/4·artanh(σ/σ_p) M shrinks by exp(−τ/σ_p²)
            kept = math.exp(-math.atanh(self.final_std / self.prior_std) / (4 * self.prior_std))
            effect = (
                f"all of it falls into the last dozen steps, which leave {kept:.2f} of the mean"
            )
        logger.warning(
            "the run of %d steps ends before the first burst of the KL (period %d): %s; set the "
            "schedule to constant, or train for more steps",
            total_steps,
            period,
            effect,
        )
