"""The KL divergence of q(A) = N(M, Ω²) from its prior: closed forms, schedules, a decoupled step.

`KLStep` is all that a Trainer or a bare loop needs of it.
"""

from bayestune.kl.closed_form import bisected, kl_divergence
from bayestune.kl.plan import Aim
from bayestune.kl.schedule import Schedule, burst_period, kl_decay, kl_weights, warmup_decay
from bayestune.kl.step import KLStep, StdOptimizer
from bayestune.kl.trainer_runs import say_unfinished

__all__ = [
    "Aim",
    "KLStep",
    "Schedule",
    "StdOptimizer",
    "bisected",
    "burst_period",
    "kl_decay",
    "kl_divergence",
    "kl_weights",
    "say_unfinished",
    "warmup_decay",
]
