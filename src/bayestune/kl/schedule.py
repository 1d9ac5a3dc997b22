"""When the KL is taken: its weight at each step, and warm-up and decay of the learning rates."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from bayestune.errors import COUNT, Refusal

Schedule = Literal["bursts", "constant", "early"]


def burst_period(num_rows: int, batch_size: int) -> int:
    """The authors' period P = ⌊100·N^(π/8)/b⌋ in steps, at least 1.

    Args:
        num_rows: N, the training rows.
        batch_size: b, the rows of one optimiser step over all processes.

    Raises:
        Refusal: if one of them is not a positive integer.

    Example:
        >>> burst_period(640, 4)
        316
    """
    if num_rows not in COUNT or batch_size not in COUNT:
        raise Refusal(
            f"a period is of rows and batches: got num_rows={num_rows} and batch_size={batch_size},"
            f" expected each to be {COUNT.said}; correct them"
        )
    return max(1, int(100 * num_rows ** (math.pi / 8) / batch_size))


def kl_weights(total_steps: int, period: int, schedule: Schedule = "bursts") -> Tensor:
    """The weights π (T,) of the KL at each step; under all schedules they sum to about 1 a period.

    "bursts": π_i = 2^i/(2^(P+1) − 1) for i = 1…P, anew in each period; "constant" and "early": 1/P.

    Args:
        total_steps: T.
        period: P in steps.
        schedule: when the KL is taken.

    Raises:
        Refusal: if the schedule is unknown.
    """
    check_schedule(schedule)
    if schedule != "bursts":
        return torch.full((total_steps,), 1 / period, dtype=torch.float64)
    i = torch.arange(total_steps, dtype=torch.float64) % period + 1
    return torch.exp2(i - period - 1) / (1 - 2.0 ** -(period + 1))


def check_schedule(schedule: str) -> None:
    """Refuses an unknown schedule."""
    if schedule not in get_args(Schedule):
        raise Refusal(
            f"unknown schedule: got {schedule!r}, expected one of {get_args(Schedule)}; correct it"
        )


def warmup_decay(total_steps: int, warmup_ratio: float = 0.06) -> Tensor:
    """The multiplier (T,) of both learning rates: linear warm-up, then linear decay to 0.

    Args:
        total_steps: T.
        warmup_ratio: the part of the steps in which it rises from 0 to 1.
    """
    steps = torch.arange(total_steps, dtype=torch.float64)
    warmup = int(warmup_ratio * total_steps)
    decay = (total_steps - steps) / max(1, total_steps - warmup)
    return torch.minimum(_rise(steps, warmup), decay)


def early_decay(total_steps: int, warmup_ratio: float = 0.06) -> Tensor:
    """The multiplier (T,) of the KL's learning rate under "early".

    Linear warm-up, then 1 for the first third of the run, then from 1/8 linearly to 0. So σ is near
    its final value after a third, and the mean is trained under the noise that it is used with.
    """
    steps = torch.arange(total_steps, dtype=torch.float64)
    warmup = int(warmup_ratio * total_steps)
    third = total_steps / 3
    tail = (total_steps - steps) / (total_steps - third) / 8
    return torch.minimum(_rise(steps, warmup), torch.where(steps < third, 1.0, tail))


def kl_decay(total_steps: int, schedule: Schedule, warmup_ratio: float = 0.06) -> Tensor:
    """The multiplier (T,) of the KL's learning rate under a schedule.

    Args:
        total_steps: T.
        schedule: when the KL is taken; "bursts" and "constant" decay alike.
        warmup_ratio: the part of the steps in which the multiplier rises from 0 to 1.
    """
    decay = early_decay if schedule == "early" else warmup_decay
    return decay(total_steps, warmup_ratio)


def _rise(steps: Tensor, warmup: int) -> Tensor:
    return steps / warmup if warmup else torch.ones_like(steps)
