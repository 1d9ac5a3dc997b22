"""The logits of the mean and of S drawn adapters, S·N rows in one pass where memory allows."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bayestune.adapters import drawn, evaluating
from bayestune.forward.before_first_draw import BeforeFirstDraw, repeated
from bayestune.forward.common_prefix import CommonPrefix
from bayestune.forward.draws import Batch, Drawable, Draws, on_device
from bayestune.forward.fingerprint import Fingerprint
from bayestune.forward.shared_prefix import SharedPrefix

Stacks = dict[str, Tensor]


@dataclass
class DrawCache:
    """Held draws, kept until the adapter or the seed changes, and what they have read of the rows' beginning."""

    seed: int = 0
    snapshot: Fingerprint | None = None
    draws: dict[int, Stacks] = field(default_factory=dict)
    last: tuple[range, Stacks] = (range(0), {})
    common: CommonPrefix = field(default_factory=CommonPrefix)

    def of(self, posterior: Drawable, draws: Draws) -> Stacks:
        """The draws as one stack (S, …) for each slot name."""
        same = self.snapshot is not None and self.snapshot.matches(posterior.model)
        if self.snapshot is None or not same or self.seed != draws.seed:
            self.snapshot = Fingerprint(posterior.model)
            self.seed, self.draws, self.last = draws.seed, {}, (range(0), {})
        if self.last[0] != draws.indices:
            for index in draws.indices:
                if index not in self.draws:
                    self.draws[index] = posterior.draw(index, draws.seed)
            chosen = [self.draws[index] for index in draws.indices]
            self.last = (
                draws.indices,
                {name: torch.stack([draw[name] for draw in chosen]) for name in chosen[0]},
            )
        return self.last[1]


def drawn_logits(posterior: Drawable, inputs: Batch, draws: Draws, held: DrawCache) -> Tensor:
    """The draws' logits (S, N, C), S·N rows in one pass within the bounds of `draws`; (1, N, C) for the mean.

    What no draw changes is computed once: all blocks before the first one with a drawn slot, or everything before the
    output head where its adapter alone is drawn. Otherwise the tokens that all rows begin with are read once for each
    draw, see `common.CommonPrefix`.

    Raises:
        ValueError: if a shared prefix is asked for and the posterior has no mean or the model cannot share one.
    """
    model, adapter = posterior.model, posterior.adapter
    if draws.count == 0:
        return mean_logits(posterior, inputs)
    stacks, inputs = held.of(posterior, draws), on_device(inputs, model)
    once, prefix = BeforeFirstDraw.of(model, stacks, adapter), _prefix(posterior, draws)
    step = draws.count if once.head else draws.at_once(inputs)
    chunks, common = [], held.common.under(model, draws.count, stacks)
    with evaluating(model):
        for start in range(0, draws.count, step):
            part = {name: weights[start : start + step] for name, weights in stacks.items()}
            size = min(step, draws.count - start)
            sharing = once.computing(model, size) if once else common.sharing(model, start, size)
            chunks.append(_pass(posterior, repeat_rows(inputs, size), part, size, sharing, prefix))
    return torch.cat(chunks)


def _pass(
    posterior: Drawable,
    inputs: Batch,
    part: Stacks,
    size: int,
    sharing: AbstractContextManager[None],
    prefix: SharedPrefix | None,
) -> Tensor:
    """The logits (size, N, C) of some of the draws, from one pass over their rows."""
    if prefix is not None:
        with prefix.drawing(part, size):
            logits = posterior.score(prefix, inputs)
    else:
        with drawn(posterior.model, part, posterior.adapter), sharing:
            logits = posterior.score(posterior.model, inputs)
    return logits.unflatten(0, (size, -1))


def _prefix(posterior: Drawable, draws: Draws) -> SharedPrefix | None:
    if draws.shared_prefix is None:
        return None
    if not posterior.has_mean:
        raise ValueError(
            f"draws cannot share a prefix: got a {type(posterior).__name__} without a mean adapter to read it with; "
            "leave shared_prefix out"
        )
    return SharedPrefix(posterior.model, draws.shared_prefix, posterior.adapter)


def repeat_rows(inputs: Batch, times: int) -> dict[str, Tensor]:
    """The batch `times` over along the leading axis: (N, …) to (times·N, …), copy by copy."""
    return {name: repeated(value, times) for name, value in inputs.items()}


def mean_logits(posterior: Drawable, inputs: Batch) -> Tensor:
    """The logits (1, N, C) of the adapter as it stands, in evaluation mode."""
    with (
        evaluating(posterior.model),
        CommonPrefix.of_mean(posterior.model).sharing(posterior.model),
    ):
        return posterior.score(posterior.model, on_device(inputs, posterior.model))[None]
