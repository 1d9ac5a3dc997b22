"""How `gpu.py` keeps to its time: what is left is shared out by weight, and a section's turns are as many as fit."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from harness import Action, interleave

USABLE = 0.92  # of the seconds asked for: the rest is for the imports before and for what a section runs over
FEWEST = 6  # turns: fewer give no interval of the median
Clock = Callable[[], float]


class UnfitError(Exception):
    """A section cannot be measured here; says why."""


class Budget:
    """Seconds to spend. Each section gets its part of what is left, so that what one saves the later ones have."""

    def __init__(self, seconds: float, clock: Clock = time.perf_counter) -> None:
        self.clock, self.end = clock, clock() + USABLE * seconds

    def deadline(self, weights: Sequence[float]) -> float:
        """The time at which the first of the sections with these weights should be done.

        Raises:
            UnfitError: if nothing is left.
        """
        left = self.end - self.clock()
        if left <= 0:
            raise UnfitError("no time is left; give it more --seconds, or fewer --sections")
        return self.clock() + left * weights[0] / sum(weights)


@dataclass(frozen=True)
class Pace:
    """What a section may take.

    Args:
        deadline: when it should be done, on the clock.
        most: turns at most.
        warmup: turns that are thrown away.
        device: waited for around each action.
        clock: in seconds.
    """

    deadline: float
    most: int
    warmup: int
    device: torch.device
    clock: Clock = time.perf_counter

    def interleave(self, actions: Mapping[str, Action]) -> dict[str, list[float]]:
        """Seconds of each action in as many turns as fit; three turns before show how long one takes.

        Raises:
            UnfitError: if fewer turns fit than an interval of the median needs.
        """
        starts: dict[int, float] = {}

        def noting(action: Action) -> Action:
            def act(turn: int) -> object:
                starts.setdefault(turn, self.clock())
                return action(turn)

            return act

        self._turns({name: noting(action) for name, action in actions.items()}, 3, 0)
        turn, left = (
            starts[2] - starts[1],
            self.deadline - self.clock(),
        )  # the first turn also loads kernels
        fit = int(left / turn) - self.warmup
        if fit < min(FEWEST, self.most):
            raise UnfitError(
                f"a turn takes {turn:.3g} s, and {max(0.0, left):.3g} s are left for it"
            )
        return self._turns(actions, min(self.most, fit), self.warmup)

    def _turns(
        self, actions: Mapping[str, Action], repeats: int, warmup: int
    ) -> dict[str, list[float]]:
        return interleave(actions, repeats, warmup=warmup, device=self.device, clock=self.clock)
