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
_NEAR = 1.05  # a σ above final_std by less than this factor has arrived


class Plan(NamedTuple):
    """π_t and the learning rates of the KL, and of G on the likelihood, at each step, (T,)."""

    weights: Tensor
    rates: Tensor
    std_rates: Tensor

    def size(self, step: int) -> float:
        """η of a step."""
        return float(self.rates[step]) * float(self.weights[step])

    def kl_time(self, step: int) -> float:
        """τ after so many steps."""
        return float((self.weights * self.rates)[:step].sum())

    def times(self, rate: float) -> "Plan":
        """The plan with the KL's rates so many times as large."""
        return self._replace(rates=self.rates * rate)


class Aim(NamedTuple):
    """Where the KL should take σ, or at which rate it is taken, and when."""

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
        """Fills what was left open.

        `kl_lr` or `period`, the authors' settings, bring the authors' bursts; else the schedule is
        "constant". Without these and bursts, `final_std` is a share of `prior_std`.
        """
        authors = kl_lr is not None or period is not None
        if schedule is None:
            schedule = "bursts" if authors else "constant"
        if final_std is None and not authors and schedule != "bursts":
            final_std = share * prior_std
        return cls(prior_std, final_std, kl_lr, schedule)

    def check(self) -> None:
        """Refuses what cannot be aimed at."""
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
        """The plan at the authors' rate, or at rate 1 where it is to be solved for."""
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
        """The rate at which the steps that are left of a plan take G's points to `final_std`."""
        final_std = self.final_std or 0.0
        start = std_after_steps([], self.prior_std, roots)
        if start > _NEAR * final_std:
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
        left = (plan.weights * plan.rates)[step:]
        if not left.sum() > 0:
            raise Refusal(
                f"no step is left to the KL: got {len(plan.rates)} steps, of which {step} are "
                "done and the others have no learning rate, expected more; train for more steps "
                "or warm up for fewer"
            )
        largest = float(left.max())
        return rate_to(final_std, (left / largest).tolist(), self.prior_std, roots) / largest

    def _warn_of_short_run(self, total_steps: int, period: int) -> None:
        if self.final_std is None:
            part = math.exp((total_steps - period) * math.log(2))
            what = f"it takes {part:.2g} of one KL"
        else:
            kept = math.exp(-math.atanh(self.final_std / self.prior_std) / (4 * self.prior_std))
            what = f"all of it falls into the last dozen steps, which leave {kept:.2f} of the mean"
        logger.warning(
            "the run of %d steps ends before the first burst of the KL (period %d): %s; set the "
            "schedule to constant, or train for more steps",
            total_steps,
            period,
            what,
        )
