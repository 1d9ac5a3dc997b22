"""The logits of the mean and of S drawn adapters, S·N rows in one pass where memory allows."""

import torch
from torch import Tensor, nn

from bayestune.adapters import Slots, evaluating
from bayestune.forward.before_first_draw import BeforeFirstDraw
from bayestune.forward.common_prefix import CommonPrefix
from bayestune.forward.draws import Batch, ClassLogits, Drawable, Draws, on_device, repeat_rows
from bayestune.forward.fingerprint import Fingerprint
from bayestune.forward.shared_prefix import SharedPrefix
from bayestune.forward.sharing import Chunk, Sharing, Stacks


def mean_logits(model: nn.Module, scorer: ClassLogits, inputs: Batch) -> Tensor:
    """The logits (1, N, C) of the adapter as it stands, in evaluation mode."""
    inputs = on_device(inputs, model)
    with evaluating(model), CommonPrefix.of_mean(model).sharing(model):
        return scorer(model, inputs)[None]


def drawn_logits(posterior: Drawable, inputs: Batch, draws: Draws, plan: "Plan") -> Tensor:
    """The draws' logits (S, N, C), S·N rows in one pass within the bounds of `draws`.

    What no draw changes is computed once, see `BeforeFirstDraw`. Otherwise the tokens that all rows
    begin with are read once for each draw, see `CommonPrefix`.

    Args:
        posterior: whose draws.
        inputs: a batch of N rows.
        draws: which draws; at least one.
        plan: what is kept between the batches of this posterior.

    Raises:
        ValueError: if a shared prefix is asked for and the posterior has no mean or the model
            cannot share one.
    """
    plan.renew(posterior, draws)
    sharing = plan.sharing(posterior, draws)
    inputs = on_device(inputs, posterior.model)
    in_one_pass = plan.only_head and draws.shared_prefix is None
    size = draws.count if in_one_pass else draws.at_once(inputs)
    parts = []
    with evaluating(posterior.model):
        for start in range(0, draws.count, size):
            chunk = plan.chunk(start, size)
            with sharing.computing(chunk) as model:
                logits = posterior.scorer(model, repeat_rows(inputs, chunk.size))
            parts.append(logits.unflatten(0, (chunk.size, -1)))
    return torch.cat(parts)


class Plan:
    """What a posterior keeps between batches: its draws, their slots, and what they share.

    All of it is renewed when the model or the seed changes.
    """

    def __init__(self) -> None:
        self._fingerprint: Fingerprint | None = None
        self._seed = 0
        self._indices = range(0)
        self._draws: dict[int, Stacks] = {}
        self._stacks: Stacks = {}
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
            self._indices = range(0)
        if self._indices != draws.indices:
            self._take(posterior, draws)

    def _take(self, posterior: Drawable, draws: Draws) -> None:
        for index in draws.indices:
            if index not in self._draws:
                self._draws[index] = posterior.draw(index, draws.seed)
        chosen = [self._draws[index] for index in draws.indices]
        self._stacks = {}
        for name in chosen[0]:
            self._stacks[name] = torch.stack([draw[name] for draw in chosen])
        self._indices = draws.indices
        self._before = BeforeFirstDraw.of(self._slots, self._stacks)

    @property
    def only_head(self) -> bool:
        """Whether any number of draws costs one pass, because only the output head is drawn."""
        return self._before.head is not None

    def chunk(self, start: int, size: int) -> Chunk:
        """Some of the draws, which run in one pass."""
        part = slice(start, start + size)
        return Chunk(start, {name: stack[part] for name, stack in self._stacks.items()})

    def sharing(self, posterior: Drawable, draws: Draws) -> Sharing:
        """How the draws share work."""
        if draws.shared_prefix is not None:
            if not posterior.has_mean:
                raise ValueError(
                    f"draws cannot share a prefix: got a {type(posterior).__name__} without a mean "
                    "adapter to read it with; leave shared_prefix out"
                )
            return SharedPrefix(self._slots, draws.shared_prefix)
        if self._before:
            return self._before
        return self.common.under(self._slots, draws.count, self._stacks)
