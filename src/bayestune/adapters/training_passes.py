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
    calls in the pass use the same noise. The model's hooks (`Entrance`) begin and end a pass; a
    call outside of any is a pass of its own.

    Gradient checkpointing recomputes calls after their pass has ended, perhaps when others have
    begun, but restores the generator's state. Every call advances the generator, so this state,
    hashed, is a name of the call, by which its pass is found again. The autograd graph of a pass's
    outputs keeps the pass alive.

    Args:
        groups: how sequences make rows in all passes; None for one row each.
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
        self._last: Pass | None = None  # with gradients, kept in case its outputs' graph is hidden

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
        """Notes that a Trainer's run begins.

        Until its end, passes without gradients use the mean: trainers take them to compute
        likelihoods under the adapter that `generate` uses, which is the mean.

        Args:
            groups: how its batches make rows, unless `ask` has set that.
            goes_on: whether the run is still going; it may end by an error without `end_run`.
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
        """In this context passes without gradients draw, even while a Trainer runs."""
        before = self._drawing
        self._drawing = True
        try:
            yield
        finally:
            self._drawing = before

    def are_at_mean(self) -> bool:
        """Whether the pass that is open now, or every pass, uses the mean."""
        _, current = self._open.get(_thread(), (0, None))
        if current is None and torch.compiler.is_compiling():
            return self.at_mean or self._mean_is_open
        return self.at_mean or (current is not None and current.at_mean)

    def begin(self, depth: int, sizes: Sizes | None) -> None:
        """Begins a pass at a module of this depth in the model, unless it is called within one."""
        open_depth, _ = self._open.get(_thread(), (depth, None))
        if open_depth < depth:
            return
        if not torch.compiler.is_compiling():
            self.are_in_run()
        begun = Pass(sizes, torch.is_grad_enabled())
        begun.at_mean = self._in_run and not begun.gradients and not self._drawing
        self._open[_thread()] = (depth, begun)  # in place of one that an interrupt left open
        if not torch.compiler.is_compiling():
            self._mean_is_open = begun.at_mean
            self._last = begun if begun.gradients else self._last

    def end(self, depth: int, output: Any) -> None:
        """Ends the pass that began at this depth; the graph of its outputs keeps it alive.

        It keeps only the noise that a recomputation could not draw again: of repeated calls.
        """
        open_depth, ended = self._open.get(_thread(), (-1, None))
        if ended is None or open_depth != depth:
            return
        del self._open[_thread()]
        if not torch.compiler.is_compiling():
            self._mean_is_open = False
        ended.noises = {layer: ended.noises[layer] for layer in ended.repeated}
        if ended.gradients and ended.rows is not None and not torch.compiler.is_compiling():
            for tensor in _tensors(output):
                if tensor.grad_fn is not None:
                    metadata: Any = tensor.grad_fn.metadata
                    metadata[_KEY] = ended

    def call(
        self, layer: Any, input: Tensor, row_axis: int | None, draw: Callable[[int], Any]
    ) -> Call:
        """The input of a layer's call in blocks, and the noise that the layer has in the pass.

        Args:
            layer: whose noise it is; layers that are computed as one (`FusedInput`) share theirs.
            input: (…, k).
            row_axis: which axis of the input is the rows', 0 or 1; None for none.
            draw: draws noise for a number of rows.

        Raises:
            Refusal: if a recomputation does not find its pass, or the rows do not fit the batch.
        """
        time_first = row_axis == 1 and input.dim() > 2
        if time_first:
            input = input.transpose(0, 1)
        opened = self._open.get(_thread())
        if opened is not None:
            _, its_pass = opened
            is_repeated = layer in its_pass.noises
            self._register(its_pass, input, is_repeated)
        else:
            its_pass, is_repeated = self._recomputed(input)
        rows = self._rows(its_pass, len(input), is_open=opened is not None)
        if is_repeated:
            noise = its_pass.noises[layer]
            torch.empty(1, device=input.device).uniform_()  # advances the generator
        else:
            noise = draw(rows.num_rows)
        if opened is not None:
            its_pass.noises[layer] = noise
            if is_repeated:
                its_pass.repeated[layer] = None
        if row_axis is None:
            return Call(*as_a_whole(input), noise, input.shape, time_first)
        blocks, which = its_pass.blocks(input, rows)
        return Call(blocks, which, noise, input.shape, time_first, its_pass.documents_in(input))

    def _rows(self, its_pass: Pass, leading: int, *, is_open: bool) -> Rows:
        """The rows of a pass; an open one uses up the setting for the next pass."""
        if its_pass.sizes is None:
            its_pass.sizes = Sizes(leading, leading)
        if its_pass.rows is None:
            groups = self._lasting or self._of_run
            if is_open:
                groups = self._next or groups
                self._next = None
            return its_pass.settle(groups)
        return its_pass.rows

    def _register(self, its_pass: Pass, input: Tensor, is_repeated: bool) -> None:
        """Names a call of a pass that may be recomputed."""
        if its_pass.gradients and not _captured(input):
            name = _name_of_call(input)
            self._named[name] = its_pass
            if is_repeated:
                its_pass.repeats.add(name)

    def _recomputed(self, input: Tensor) -> tuple[Pass, bool]:
        """The pass of a recomputed call, and whether it repeats an earlier one; else a new pass."""
        if self._last is not None and not _captured(input):
            name = _name_of_call(input)
            its_pass = self._named.get(name)
            if its_pass is not None:
                return its_pass, name in its_pass.repeats
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
    """Whether calls are compiled or recorded, so that the generator's state cannot be read."""
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
