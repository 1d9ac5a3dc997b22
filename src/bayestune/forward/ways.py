"""The ways to run some draws of a batch, the cheapest first; what a way gives is checked."""

from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from bayestune.adapters import Arrivals, Slots, check_arrived, is_spread
from bayestune.errors import Refusal
from bayestune.forward.draws import Batch, Chunk, ClassLogits, main_input, repeat_rows
from bayestune.forward.verdicts import Verdicts, agrees, coincidences, sizes_change

TOGETHER = "together"
ALONE = "alone"
FEW_LOGITS = 16  # of a draw: fewer tell too little of how large rounding is beside them


class Sharing(Protocol):
    """How the draws of a pass share work."""

    @property
    def way(self) -> str:
        """What the last pass shared."""
        ...

    def computing(self, chunk: Chunk, arrivals: Arrivals) -> AbstractContextManager[nn.Module]:
        """For the time of a pass over S·N rows; what is to be called."""
        ...


@dataclass
class Ways:
    """Runs draws of one batch: sharing work, or S·N rows in one plain pass, or draw by draw.

    A way is left for the next one if a layer sees other rows than the pass brings, or the model
    fails, or one draw of the pass is not what it is alone. That is compared once for a kind of
    batch. Draw by draw, every model is right.

    Args:
        slots: where the draws stand.
        scorer: which gives the logits.
        inputs: the batch of N rows, on the model's device.
        sharing: the cheapest way.
        kind: of the batch.
        only_head: whether draws stand in the output head alone.
        approximate: whether the user asked for what is shared, so that a draw alone shares it too.
    """

    slots: Slots
    scorer: ClassLogits
    inputs: Batch
    sharing: Sharing
    kind: Hashable
    only_head: bool = False
    approximate: bool = False

    def logits(self, chunk: Chunk) -> Tensor:
        """Logits (S, N, C) of the chunk's draws.

        Raises:
            Refusal: if the draws reach no layer, or the logits are not a row for each row.
        """
        verdicts = Verdicts.of(self.slots.model)
        kind = (self.kind, coincidences(self.inputs, chunk.size, self.slots.model))
        failed: list[str] = []
        logits = torch.empty(0)
        taken = ALONE
        for way in self._open(chunk, verdicts, kind):
            try:
                logits, taken = self._run(way, chunk)
            except Exception as problem:
                if way == ALONE or _out_of_memory(problem):
                    raise
                failed.append(way if way == TOGETHER else self.sharing.way)
                continue
            if taken == ALONE or self._is_right(logits, taken, chunk, kind):
                break
        for way in failed:  # only now: a batch that no way can run says nothing of the ways
            verdicts.put((kind, way), agrees=False)
        if taken == ALONE and chunk.size > 1:
            self._say_slow(verdicts)
        return logits.unflatten(0, (chunk.size, -1))

    def _open(self, chunk: Chunk, verdicts: Verdicts, kind: Hashable) -> Iterator[str]:
        """The ways that are not known to be wrong; asked one by one, as they are tried."""
        if is_spread(self.slots.model):  # all processes must make the same passes
            yield ALONE
            return
        together = not verdicts.wrong((kind, TOGETHER))
        shared = [way for way in ("once", "prefix", "mean's prefix") if way == self._shares]
        if together and not any(verdicts.wrong((kind, way)) for way in shared):
            yield "shared"
        one_pass = chunk.size > 1 and not (self.only_head or self.approximate)
        if one_pass and not verdicts.wrong((kind, TOGETHER)):
            yield TOGETHER
        yield ALONE

    @property
    def _shares(self) -> str:
        way = self.sharing.way
        return "prefix" if way == TOGETHER else way

    def _run(self, way: str, chunk: Chunk) -> tuple[Tensor, str]:
        """The logits (S·N, C), and what the pass shared in the end."""
        if way == ALONE:
            parts = [self._alone(chunk, place) for place in range(chunk.size)]
            return torch.cat(parts), ALONE
        rows = chunk.size * len(main_input(self.inputs))
        arrivals = Arrivals(chunk.size, rows)
        inputs = repeat_rows(self.inputs, chunk.size)
        if way == TOGETHER:
            with self.slots.holding(chunk.stacks, arrivals):
                logits = self.scorer(self.slots.model, inputs)
        else:
            with self.sharing.computing(chunk, arrivals) as model:
                logits = self.scorer(model, inputs)
            way = self.sharing.way
        self._check_arrived(arrivals, chunk)
        return checked(logits), ALONE if way in ("once", TOGETHER) and chunk.size == 1 else way

    def _alone(self, chunk: Chunk, place: int, inputs: Batch | None = None) -> Tensor:
        """The logits (N, C) of one draw in a plain pass over the batch as it is, or another."""
        inputs = self.inputs if inputs is None else inputs
        one = chunk.one(place)
        arrivals = Arrivals(1)
        if self.approximate:
            with self.sharing.computing(one, arrivals) as model:
                logits = self.scorer(model, inputs)
        else:
            with self.slots.holding(one.stacks, arrivals):
                logits = self.scorer(self.slots.model, inputs)
        self._check_arrived(arrivals, one)
        return checked(logits)

    def _is_right(self, logits: Tensor, way: str, chunk: Chunk, kind: Hashable) -> bool:
        """Whether a pass gave as many rows as it should, and one draw's are those it has alone."""
        verdicts = Verdicts.of(self.slots.model)
        if verdicts.wrong((kind, way)):
            return False
        share = len(logits) / (chunk.size * len(main_input(self.inputs)))
        if len(logits) % chunk.size == 0 and not verdicts.due((kind, way, share)):
            return True
        found: bool | None = False
        if len(logits) % chunk.size == 0:
            found = self._agrees(logits.unflatten(0, (chunk.size, -1)), chunk)
        verdicts.put((kind, way, share), found)
        if found is False:
            verdicts.put((kind, way), found)
        return found is not False

    def _agrees(self, together: Tensor, chunk: Chunk) -> bool | None:
        """Whether a draw of a pass is what it is alone.

        One draw of a small batch has few logits: by chance they may be small beside what rounding
        changes. Then all draws are compared, for those that share a wrong pass are all wrong.
        """
        model = self.slots.model
        place = chunk.size // 2  # a wrong way might be right for the first or the last
        one = self._alone(chunk, place)
        by_size = None
        if not self.approximate:
            again = partial(self._alone, chunk, place)
            by_size = sizes_change(again, self.inputs, one, chunk.size)
        found = agrees(together, one, place, model, by_size)
        if found is not False or chunk.size == 1 or one.numel() >= FEW_LOGITS:
            return found
        others = [self._alone(chunk, other) for other in range(chunk.size) if other != place]
        alone = torch.stack([*others[:place], one, *others[place:]])
        return agrees(together, alone, slice(None), model, by_size)

    def _check_arrived(self, arrivals: Arrivals, chunk: Chunk) -> None:
        """Refuses passes that use no draw; names, once, slots that a pass does not use."""
        check_arrived(arrivals, self.slots.layers, self.slots.adapter)
        missing = chunk.stacks.keys() - arrivals.called
        if missing:
            Verdicts.of(self.slots.model).say_once(
                "not called",
                "%d of the adapter's %d slots were not called in a pass, such as %s: the model "
                "does not use their layers for every batch (experts, or another branch), so their "
                "draws change nothing there",
                len(missing),
                len(chunk.stacks),
                min(missing),
            )

    def _say_slow(self, verdicts: Verdicts) -> None:
        if is_spread(self.slots.model):
            verdicts.say_once(
                "spread",
                "the model is spread over processes, so it runs one draw at a time, in all of them "
                "together; a saved posterior loaded on the whole model predicts faster",
            )
            return
        kind = type(self.slots.model).__name__
        base = getattr(self.slots.model, "get_base_model", None)
        verdicts.say_once(
            "draw by draw",
            "%s runs one draw at a time: some of its layers do not see the batch's rows as their "
            "first axis, so draws cannot share a pass; predictions are exact, but slower",
            kind if base is None else type(base()).__name__,
        )


def checked(logits: Tensor) -> Tensor:
    """Class logits of a scorer, if they are that.

    Raises:
        Refusal: if there is not one vector for each row.
    """
    if not isinstance(logits, Tensor) or logits.dim() < 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise Refusal(
            f"a scorer must give class logits (N, C): got {shape}; return a tensor with a row for "
            "each row of the batch and a column for each class"
        )
    return logits


def _out_of_memory(problem: Exception) -> bool:
    """Whether a pass failed for memory, which says nothing of the way; the CPU says it in words."""
    return isinstance(problem, torch.OutOfMemoryError) or "memory" in str(problem)
