"""The ways to run some draws of a batch, tried from the cheapest on and checked to be exact."""

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
        """A context for a pass over S·N rows; gives the module to call in it."""
        ...


@dataclass
class Ways:
    """Runs draws of one batch: sharing work, or S·N rows in one plain pass, or draw by draw.

    A way is given up for the next one if a layer sees other rows than those of the pass, the model
    fails, or a draw's logits in the pass are not those that it has alone, which is compared once
    for a kind of batch. Draw by draw, the logits are right for every model.

    Args:
        slots: where the draws stand.
        scorer: which gives the logits.
        inputs: the batch of N rows, on the model's device.
        sharing: the cheapest way.
        kind: of the batch.
        only_head: whether draws stand in the output head alone.
        approximate: whether `sharing` is an approximation that the user asked for, so that a draw
            that runs alone is to share as well.
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
        """The ways that are not known to be wrong; looked up one by one, as they are tried."""
        if is_spread(self.slots.model):  # all processes must make the same passes
            yield ALONE
            return
        if not verdicts.wrong((kind, TOGETHER)) and not verdicts.wrong((kind, self._shares)):
            yield "shared"
        one_pass = chunk.size > 1 and not (self.only_head or self.approximate)
        if one_pass and not verdicts.wrong((kind, TOGETHER)):
            yield TOGETHER
        yield ALONE

    @property
    def _shares(self) -> str:
        """What `sharing` would share: a common prefix also if its last pass shared none."""
        way = self.sharing.way
        return "prefix" if way == TOGETHER else way

    def _run(self, way: str, chunk: Chunk) -> tuple[Tensor, str]:
        """The logits (S·N, C), and the way that was taken in the end, by what the pass shared."""
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
        """The logits (N, C) of one draw in a pass of its own.

        Args:
            chunk: which holds the draw.
            place: of the draw in the chunk.
            inputs: another batch than this one, if not None.
        """
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
        """Whether a pass gave as many rows as it should, and a draw has the logits it has alone."""
        verdicts = Verdicts.of(self.slots.model)
        if verdicts.wrong((kind, way)):
            return False
        divides = len(logits) % chunk.size == 0
        share = len(logits) / (chunk.size * len(main_input(self.inputs)))  # vectors for each row
        if divides and not verdicts.due((kind, way, share)):
            return True
        verdict: bool | None = False
        if divides:
            verdict = self._agrees(logits.unflatten(0, (chunk.size, -1)), chunk)
        verdicts.put((kind, way, share), verdict)
        if verdict is False:
            verdicts.put((kind, way), verdict)
        return verdict is not False

    def _agrees(self, together: Tensor, chunk: Chunk) -> bool | None:
        """Whether a draw has in a pass the logits that it has alone; None if it cannot be told.

        One draw of a small batch has few logits, which by chance may be small beside rounding. If
        they differ, all draws are compared: those of a wrong pass are all wrong.
        """
        model = self.slots.model
        place = chunk.size // 2  # a wrong way might be right for the first or the last
        one = self._alone(chunk, place)
        by_size = None
        if not self.approximate:
            again = partial(self._alone, chunk, place)
            by_size = sizes_change(again, self.inputs, one, chunk.size)
        verdict = agrees(together, one, place, model, by_size)
        if verdict is not False or chunk.size == 1 or one.numel() >= FEW_LOGITS:
            return verdict
        others = [self._alone(chunk, other) for other in range(chunk.size) if other != place]
        alone = torch.stack([*others[:place], one, *others[place:]])
        return agrees(together, alone, slice(None), model, by_size)

    def _check_arrived(self, arrivals: Arrivals, chunk: Chunk) -> None:
        """Refuses passes that use no draw; warns, once for a model, of slots that are not used."""
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
    """A scorer's result, if it has the form of class logits (N, C).

    Raises:
        Refusal: if it is no tensor of two or more axes.
    """
    if not isinstance(logits, Tensor) or logits.dim() < 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise Refusal(
            f"a scorer must give class logits (N, C): got {shape}; return a tensor with a row for "
            "each row of the batch and a column for each class"
        )
    return logits


def _out_of_memory(problem: Exception) -> bool:
    """Whether a pass ran out of memory, which says nothing about the way; on a CPU by its text."""
    return isinstance(problem, torch.OutOfMemoryError) or "memory" in str(problem)
