"""The logits of the mean and of S drawn adapters, S·N rows in one pass where memory allows."""

from collections.abc import Iterator
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from bayestune.adapters import (
    Arrivals,
    Slots,
    base_of,
    evaluating,
    is_spread,
    refuse_inside_drawn,
    unwrapped,
    why_silent,
)
from bayestune.errors import Refusal
from bayestune.forward.before_first_draw import BeforeFirstDraw
from bayestune.forward.common_prefix import CommonPrefix
from bayestune.forward.draws import (
    Batch,
    Chunk,
    ClassLogits,
    Draws,
    on_device,
    stacked_weights,
)
from bayestune.forward.fingerprint import Fingerprint
from bayestune.forward.shared_prefix import SharedPrefix
from bayestune.forward.verdicts import Verdicts, agrees, coincidences, kind_of, sizes_change
from bayestune.forward.ways import Ways, checked


class Drawable(Protocol):
    """What a pass over drawn adapters needs to know of a posterior."""

    model: nn.Module
    scorer: ClassLogits
    adapter: str
    has_mean: bool

    def draw(self, index: int, seed: int = 0) -> dict[str, Tensor]:
        """One held draw's weights that differ from the adapter's, by slot: A (r, k), B (d, r)."""
        ...


def mean_logits(model: nn.Module, scorer: ClassLogits, inputs: Batch) -> Tensor:
    """The logits (1, N, C) of the adapter as it stands, in evaluation mode.

    Tokens that all rows begin with are read once for many batches, see `CommonPrefix`, unless the
    logits were then found to differ from those of a plain pass.

    Args:
        model: the model with the adapter.
        scorer: maps the model and the batch to class logits (N, C).
        inputs: the batch of N rows.
    """
    plain = unwrapped(model)
    with evaluating(plain):
        prefix = CommonPrefix.of_mean(plain)
        kind = ("mean", kind_of(inputs, scorer, frozenset()), coincidences(inputs, 1, plain))
        inputs = on_device(inputs, plain)
        if prefix.compiled or is_spread(plain):
            return checked(scorer(model, inputs))[None]
        verdicts = Verdicts.of(plain)
        if not verdicts.wrong(kind):
            with prefix.sharing(plain):
                logits = checked(scorer(plain, inputs))
            if not prefix.shared or not verdicts.due(kind):
                return logits[None]
            # compared once for a kind of batch, here outside of `sharing`
            expected = scorer(plain, inputs)
            by_size = sizes_change(partial(scorer, plain), inputs, expected)
            verdicts.put(kind, agrees(logits[None], expected, 0, plain, by_size))
            if not verdicts.wrong(kind):
                return logits[None]
        return checked(scorer(plain, inputs))[None]


def drawn_logits(posterior: Drawable, inputs: Batch, draws: Draws, kept: "KeptDraws") -> Tensor:
    """The draws' logits (S, N, C), S·N rows in one pass within the bounds of `draws`.

    What no draw changes is computed once, see `BeforeFirstDraw`. Otherwise the tokens that all rows
    begin with are read once for each draw, see `CommonPrefix`. What is not exact for the model at
    hand is not shared, see `Ways`.

    Args:
        posterior: whose draws.
        inputs: the batch of N rows.
        draws: which draws, the bounds of a pass, and its precision.
        kept: what this posterior keeps between batches.

    Raises:
        Refusal: if the draws reach no layer, or a shared prefix is asked for and the posterior has
            no mean or the model cannot share one.
    """
    with evaluating(unwrapped(posterior.model)):
        refuse_inside_drawn(posterior.model, posterior.adapter)
        kept.renew(posterior, draws)
        ways = kept.ways(posterior, inputs, draws)
        return torch.cat([ways.logits(chunk) for chunk in kept.chunks(ways.inputs, draws)])


class KeptDraws:
    """Draws, slots and prefixes that a posterior keeps between batches of one model and seed."""

    def __init__(self) -> None:
        self._fingerprint: Fingerprint | None = None
        self._seed = 0
        self._draws: dict[int, dict[str, Tensor]] = {}
        self._indices = range(0)
        self._stacks: dict[str, Tensor] = {}
        self.common = CommonPrefix()

    def renew(self, posterior: Drawable, draws: Draws) -> None:
        """Gets the draws that are asked for; forgets those of another model or seed.

        Raises:
            Refusal: if the draws would reach no layer, or hold no weights.
        """
        model = unwrapped(posterior.model)
        same_model = self._fingerprint is not None and self._fingerprint.matches(model)
        if not same_model or self._seed != draws.seed:
            self._fingerprint = Fingerprint(model)
            self._seed = draws.seed
            self._slots = Slots(posterior.model, posterior.adapter)
            self._draws = {}
            self._stacks = {}
        elif self._stacks and self._indices == draws.indices:
            return
        silent = why_silent(self._slots.layers, posterior.adapter)
        if silent is not None:
            reason, remedy = silent
            raise Refusal(f"the draws would reach nothing, because {reason}; {remedy}")
        for index in draws.indices:
            if index not in self._draws:
                self._draws[index] = posterior.draw(index, draws.seed)
        self._indices = draws.indices
        self._stacks = stacked_weights([self._draws[index] for index in draws.indices])
        if not self._stacks:
            raise Refusal(
                f"the draws hold no weights: got a {type(posterior).__name__} whose model has no "
                "stochastic layer any more, expected those it was made with; load it anew"
            )
        self._names = frozenset(self._stacks)
        self._before = BeforeFirstDraw.of(self._slots, self._stacks)

    def ways(self, posterior: Drawable, inputs: Batch, draws: Draws) -> Ways:
        """The ways to run this batch's draws: sharing a prefix if asked for, else as is exact.

        Raises:
            Refusal: if a shared prefix is asked for and cannot be.
        """
        scorer = posterior.scorer
        kind = (kind_of(inputs, scorer, self._names), draws.shared_prefix is None)
        inputs = on_device(inputs, self._slots.model)
        if draws.shared_prefix is not None:
            self._refuse_spread_prefix(draws.shared_prefix)
            shared = self._shared_prefix(posterior, draws.shared_prefix)
            ways = Ways(self._slots, scorer, inputs, shared, kind, approximate=True)
            self._refuse_inexact_prefix(ways, draws.shared_prefix)
            return ways
        if self._before.drawn:
            only_head = self._before.only_head
            return Ways(self._slots, scorer, inputs, self._before, kind, only_head)
        self.common.slots = self._slots
        common = self.common.under(self._slots.model, draws.count, self._stacks)
        return Ways(self._slots, scorer, inputs, common, kind)

    def _shared_prefix(self, posterior: Drawable, length: int) -> SharedPrefix:
        if not posterior.has_mean:
            raise Refusal(
                f"draws cannot share a prefix: got a {type(posterior).__name__} without a mean "
                "adapter to read it with; leave shared_prefix out"
            )
        return SharedPrefix(self._slots, length)

    def _refuse_spread_prefix(self, length: int) -> None:
        if is_spread(self._slots.model):
            raise Refusal(
                "draws cannot share a prefix in several processes that have parts of the model: "
                f"got shared_prefix={length}, expected None; leave it out, or load the saved "
                "posterior on the whole model"
            )

    def _refuse_inexact_prefix(self, ways: Ways, length: int) -> None:
        """Refuses a prefix if even the mean's logits change when it reads a prompt in two parts."""
        model = self._slots.model
        verdicts = Verdicts.of(model)
        kind = ("mean in two parts", ways.kind)
        if verdicts.due(kind):
            without_draws = SharedPrefix(self._slots, length)
            with without_draws.computing(Chunk(0, 1, {}), Arrivals(1)) as reader:
                in_parts = checked(ways.scorer(reader, ways.inputs))[None]
            in_one = checked(ways.scorer(model, ways.inputs))
            by_size = sizes_change(partial(ways.scorer, model), ways.inputs, in_one)
            verdicts.put(kind, agrees(in_parts, in_one, 0, model, by_size))
        if verdicts.wrong(kind):
            raise Refusal(
                f"draws cannot share a prefix: a {type(base_of(model)).__name__} gives other "
                "logits where it reads a prompt in two parts, got a difference beyond rounding, "
                "expected none; leave shared_prefix out"
            )

    def chunks(self, inputs: Batch, draws: Draws) -> Iterator[Chunk]:
        """The draws of each pass; all of them in one where only the output head is drawn."""
        only_head = self._before.only_head and draws.shared_prefix is None
        size = draws.count if only_head else draws.at_once(inputs)
        for start in range(0, draws.count, size):
            stop = min(start + size, draws.count)
            stacks = {name: stack[start:stop] for name, stack in self._stacks.items()}
            yield Chunk(start, stop - start, stacks)
