"""When the KL is taken: its weight at each step, and warm-up and decay of the learning rates."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from bayestune.errors import Refusal

Schedule = Literal["bursts", "constant"]


def burst_period(num_rows: int, batch_size: int) -> int:
    """The authors' period P = ⌊100·N^(π/8)/b⌋ in steps, at least 1.

    Args:
        num_rows: N, the training rows.
        batch_size: b, the rows of one optimiser step over all processes.

    Example:
        >>> burst_period(640, 4)
        316
    """
    return max(1, int(100 * num_rows ** (math.pi / 8) / batch_size))


def kl_weights(total_steps: int, period: int, schedule: Schedule = "bursts") -> Tensor:
    """The weights π (T,) of the KL at each step; both schedules give about one KL a period P.

    "bursts": π_i = 2^i/(2^(P+1) − 1) for i = 1…P, again and again; "constant": 1/P.

    Raises:
        Refusal: if the schedule is unknown.
    """
    if schedule not in get_args(Schedule):
        raise Refusal(
            f"unknown schedule: got {schedule!r}, expected one of {get_args(Schedule)}; correct it"
        )
    if schedule == "constant":
        return torch.full((total_steps,), 1 / period, dtype=torch.float64)
    place = torch.arange(total_steps, dtype=torch.float64) % period + 1
    return torch.exp2(place - period - 1) / (1 - 2.0 ** -(period + 1))


def warmup_decay(total_steps: int, warmup_ratio: float = 0.06) -> Tensor:
    """The multiplier (T,) of both learning rates: linear warm-up, then linear decay to 0."""
    steps = torch.arange(total_steps, dtype=torch.float64)
    warmup = int(warmup_ratio * total_steps)
    rise = steps / warmup if warmup else torch.ones_like(steps)
    return torch.minimum(rise, (total_steps - steps) / max(1, total_steps - warmup))
