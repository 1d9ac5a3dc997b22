"""The logits of the mean and of S drawn adapters, S·N rows in one pass where memory allows."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from bayestune.adapters import Slots, evaluating
from bayestune.errors import Refusal
from bayestune.forward.before_first_draw import BeforeFirstDraw
from bayestune.forward.common_prefix import CommonPrefix
from bayestune.forward.draws import Batch, Chunk, ClassLogits, Draws, on_device, repeat_rows
from bayestune.forward.fingerprint import Fingerprint
from bayestune.forward.shared_prefix import SharedPrefix


class Drawable(Protocol):
    """What a pass over drawn adapters needs to know of a posterior."""

    model: nn.Module
    scorer: ClassLogits
    adapter: str
    has_mean: bool

    def draw(self, index: int, seed: int = 0) -> dict[str, Tensor]:
        """One held draw by slot name, what differs from the adapter: A (r, k), B (d, r)."""
        ...


def mean_logits(model: nn.Module, scorer: ClassLogits, inputs: Batch) -> Tensor:
    """The logits (1, N, C) of the adapter as it stands, in evaluation mode."""
    inputs = on_device(inputs, model)
    with evaluating(model), CommonPrefix.of_mean(model).sharing(model):
        return scorer(model, inputs)[None]


def drawn_logits(posterior: Drawable, inputs: Batch, draws: Draws, plan: "Plan") -> Tensor:
    """The draws' logits (S, N, C), S·N rows in one pass within the bounds of `draws`.

    What no draw changes is computed once, see `BeforeFirstDraw`. Otherwise the tokens that all rows
    begin with are read once for each draw, see `CommonPrefix`. The plan is the posterior's own.

    Raises:
        Refusal: if a shared prefix is asked for and the posterior has no mean or the model
            cannot share one.
    """
    plan.renew(posterior, draws)
    sharing = plan.sharing(posterior, draws)
    inputs = on_device(inputs, posterior.model)
    parts = []
    with evaluating(posterior.model):
        for chunk in plan.chunks(inputs, draws):
            with sharing.computing(chunk) as model:
                logits = posterior.scorer(model, repeat_rows(inputs, chunk.size))
            parts.append(logits.unflatten(0, (chunk.size, -1)))
    return torch.cat(parts)


class Plan:
    """What a posterior keeps between batches while model and seed stay: draws, slots, prefixes."""

    def __init__(self) -> None:
        self._fingerprint: Fingerprint | None = None
        self._seed = 0
        self._draws: dict[int, dict[str, Tensor]] = {}
        self._indices = range(0)
        self._stacks: dict[str, Tensor] = {}
        self.common = CommonPrefix()

    def renew(self, posterior: Drawable, draws: Draws) -> None:
        """Takes the draws that are asked for; keeps earlier ones while the model is the same."""
        model = posterior.model
        same = self._fingerprint is not None and self._fingerprint.matches(model)
        if not same or self._seed != draws.seed:
            self._fingerprint = Fingerprint(model)
            self._seed = draws.seed
            self._slots = Slots(model, posterior.adapter)
            self._draws = {}
        elif self._indices == draws.indices:
            return
        for index in draws.indices:
            if index not in self._draws:
                self._draws[index] = posterior.draw(index, draws.seed)
        chosen = [self._draws[index] for index in draws.indices]
        self._indices = draws.indices
        self._stacks = {}
        for name in chosen[0]:
            self._stacks[name] = torch.stack([draw[name] for draw in chosen])
        self._before = BeforeFirstDraw.of(self._slots, self._stacks)

    def sharing(
        self, posterior: Drawable, draws: Draws
    ) -> BeforeFirstDraw | CommonPrefix | SharedPrefix:
        """How the draws share work."""
        if draws.shared_prefix is not None:
            if not posterior.has_mean:
                raise Refusal(
                    f"draws cannot share a prefix: got a {type(posterior).__name__} without a mean "
                    "adapter to read it with; leave shared_prefix out"
                )
            return SharedPrefix(self._slots, draws.shared_prefix)
        if self._before.drawn:
            return self._before
        self.common.slots = self._slots
        return self.common.under(self._slots.model, draws.count, self._stacks)

    def chunks(self, inputs: Batch, draws: Draws) -> Iterator[Chunk]:
        """The draws of each pass; all of them in one where only the output head is drawn."""
        only_head = self._before.only_head and draws.shared_prefix is None
        size = draws.count if only_head else draws.at_once(inputs)
        for start in range(0, draws.count, size):
            stop = min(start + size, draws.count)
            stacks = {name: stack[start:stop] for name, stack in self._stacks.items()}
            yield Chunk(start, stop - start, stacks)
