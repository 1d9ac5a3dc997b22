"""One draw for each row of a training pass: kept for a layer's next call and for recomputation."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from bayestune.adapters.one_pass import Call, Pass, Sizes, as_a_whole
from bayestune.adapters.row_groups import RowGroups, Rows
from bayestune.errors import Refusal

_KEY = "bayestune"


class TrainingPasses:
    """The passes of a model, shared by its random layers: a draw belongs to a pass and a row.

    A layer draws its noise at its first call in a pass, from torch's global generator; its later
    calls in the pass find that noise. Where a pass begins and ends the model's hooks say; a call
    outside of any pass is a pass of its own.

    A checkpoint recomputes calls when their pass has ended, perhaps after others have begun, but
    with the generator as it was. Every call moves the generator on, so the state that a call finds
    is a name of the call, by which its pass is found. A pass is kept by the graph of its outputs.
    """

    def __init__(self, groups: RowGroups | None = None) -> None:
        self.at_mean = False
        self._lasting = groups
        self._next: RowGroups | None = None
        self._drawing = False
        self.end_run()
        self._forget()

    def _forget(self) -> None:
        self._open: dict[int, tuple[int, Pass]] = {}  # by thread: nn.DataParallel has several
        self._named: WeakValueDictionary[int, Pass] = WeakValueDictionary()
        self._mean_is_open = False  # for parts of a model that are compiled by themselves
        self._last: Pass | None = None  # with gradients; its outputs may have no graph we can find

    def __getstate__(self) -> dict[str, Any]:
        """A copy of the model has the same settings and passes of its own."""
        return {"_lasting": self._lasting, "_next": self._next}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The settings, and no pass."""
        self.__init__(state["_lasting"])
        self._next = state["_next"]

    def ask(self, groups: RowGroups, *, lasting: bool = False) -> None:
        """Sets how the sequences of the next pass, or of all passes, make rows."""
        if lasting:
            self._lasting = groups
        self._next = None if lasting else groups

    def begin_run(self, groups: RowGroups | None, goes_on: Callable[[], bool]) -> None:
        """Notes that a Trainer's run begins, and how its batches make rows if nobody has said.

        Until its end, passes without gradients are the mean's: what a trainer asks without them is
        how likely something is under the adapter that writes its texts, `generate`'s. A run that an
        error or an interrupt ends does not say so: then `goes_on` is false.
        """
        self._of_run = groups
        self._in_run = True
        self._goes_on = goes_on

    def end_run(self) -> None:
        """Notes that a Trainer's run has ended."""
        self._of_run: RowGroups | None = None
        self._in_run = False
        self._goes_on: Callable[[], bool] = lambda: False

    def are_in_run(self) -> bool:
        """Whether a Trainer's run goes on; ends one that has ended without saying so."""
        if self._in_run and not self._goes_on():
            self.end_run()
        return self._in_run

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Passes without gradients draw here in a Trainer's run, too: their draws are asked for."""
        before = self._drawing
        self._drawing = True
        try:
            yield
        finally:
            self._drawing = before

    def are_at_mean(self) -> bool:
        """Whether the pass that is open now, or every pass, is the mean's."""
        _, one = self._open.get(_thread(), (0, None))
        if one is None and torch.compiler.is_compiling():
            return self.at_mean or self._mean_is_open
        return self.at_mean or (one is not None and one.at_mean)

    def begin(self, depth: int, sizes: Sizes | None) -> None:
        """Begins a pass at a module of this depth in the model, unless it is called within one."""
        open_depth, _ = self._open.get(_thread(), (depth, None))
        if open_depth < depth:
            return
        if not torch.compiler.is_compiling():
            self.are_in_run()
        one = Pass(sizes, torch.is_grad_enabled())
        one.at_mean = self._in_run and not one.gradients and not self._drawing
        self._open[_thread()] = (depth, one)  # one that an interrupt left open is dropped
        if not torch.compiler.is_compiling():
            self._mean_is_open = one.at_mean
            self._last = one if one.gradients else self._last

    def end(self, depth: int, output: Any) -> None:
        """Ends the pass that began at this depth; its outputs' graph keeps what may be needed."""
        open_depth, one = self._open.get(_thread(), (-1, None))
        if one is None or open_depth != depth:
            return
        del self._open[_thread()]
        if not torch.compiler.is_compiling():
            self._mean_is_open = False
        one.noises = {layer: one.noises[layer] for layer in one.repeated}
        if one.gradients and one.rows is not None and not torch.compiler.is_compiling():
            for tensor in _tensors(output):
                if tensor.grad_fn is not None:
                    metadata: Any = tensor.grad_fn.metadata
                    metadata[_KEY] = one

    def call(
        self, layer: Any, input: Tensor, row_axis: int | None, draw: Callable[[int], Any]
    ) -> Call:
        """The input of a layer's call in blocks, and the noise that the layer has in the pass.

        Args:
            layer: whose noise; layers that are computed as one have one.
            input: (…, k).
            row_axis: which axis of the input is the rows', 0 or 1; None for none.
            draw: draws the noise of so many rows.

        Raises:
            Refusal: if a recomputation does not find its pass, or the rows do not fit the batch.
        """
        time_first = row_axis == 1 and input.dim() > 2
        if time_first:
            input = input.transpose(0, 1)
        opened = self._open.get(_thread())
        if opened is not None:
            one = opened[1]
            again = layer in one.noises
            self._register(one, input, again)
        else:
            one, again = self._found(input)
        rows = self._rows(one, len(input), is_open=opened is not None)
        if again:
            noise = one.noises[layer]
            torch.empty(1, device=input.device).uniform_()  # moves the generator on
        else:
            noise = draw(rows.num_rows)
        if opened is not None:
            one.noises[layer] = noise
            if again:
                one.repeated[layer] = None
        if row_axis is None:
            return Call(*as_a_whole(input), noise, input.shape, time_first)
        blocks, which = one.blocks(input, rows)
        return Call(blocks, which, noise, input.shape, time_first, one.documents_in(input))

    def _rows(self, one: Pass, leading: int, *, is_open: bool) -> Rows:
        """The rows of a pass; what was asked for the next pass is used up."""
        if one.sizes is None:
            one.sizes = Sizes(leading, leading)
        if one.rows is None:
            groups = self._lasting or self._of_run
            if is_open:
                groups = self._next or groups
                self._next = None
            return one.settle(groups)
        return one.rows

    def _register(self, one: Pass, input: Tensor, again: bool) -> None:
        """Names a call of a pass that may be recomputed."""
        if one.gradients and not _captured(input):
            name = _name_of_call(input)
            self._named[name] = one
            if again:
                one.repeats.add(name)

    def _found(self, input: Tensor) -> tuple[Pass, bool]:
        """The pass of a recomputed call, and whether the layer had its noise; else a new pass."""
        if self._last is not None and not _captured(input):
            name = _name_of_call(input)
            one = self._named.get(name)
            if one is not None:
                return one, name in one.repeats
            if torch._C._current_graph_task_id() != -1:
                raise Refusal(
                    "a recomputed layer does not find the draw of its pass: got another state of "
                    "the random generator than in any pass, expected the one it was called with; "
                    "use checkpointing that restores it (preserve_rng_state=True)"
                )
        return Pass(None, gradients=False), False


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _captured(input: Tensor) -> bool:
    """Whether calls are compiled or recorded, so that the generator has no state to ask for."""
    capturing = input.is_cuda and torch.cuda.is_current_stream_capturing()
    return torch.compiler.is_compiling() or capturing


def _name_of_call(input: Tensor) -> int:
    """A hash of the generator's state and the input's shape."""
    device = input.device
    if device.type == "cpu":
        state = torch.get_rng_state()
    elif device.type == "mps":
        state = torch.mps.get_rng_state()
    else:
        state = torch.get_device_module(device).get_rng_state(device)
    return hash((device, tuple(input.shape), state.numpy().tobytes()))


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in a model's output."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
