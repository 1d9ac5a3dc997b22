"""Gradients of the class logits at LoRA's slots, row by row.

A slot maps a to W·a at every token. With g the gradient of a class logit at the slot's output, the
row's Jacobian of that logit with respect to W is J = Σ_t g_t a_tᵀ, of W's shape. Rows do not see
each other, so one backward pass on a sum over rows gives every row's g.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn

from bayestune.adapters import OtherRows, eagerly, evaluating, is_compiled, unwrapped
from bayestune.errors import Refusal
from bayestune.forward import (
    Batch,
    ClassLogits,
    Verdicts,
    agrees,
    checked,
    coincidences,
    finite_rms,
    kind_of,
    on_device,
    sizes_change,
)

Calls = dict[str, list[tuple[Tensor, Tensor]]]
"""Two tensors for each call of each slot, by slot name."""


@dataclass(frozen=True)
class Trace:
    """A forward pass: class logits (N, C), and slots' inputs and outputs, attached to its graph."""

    logits: Tensor
    calls: Calls

    def gradients(self, weights: Tensor, *, keep: bool) -> Calls:
        """Inputs a (N, L, in) and gradients g (N, L, out) of Σ_nc weights_nc·logits_nc.

        L counts the tokens of all sequences of a row; g is exactly 0 at padding, on which no logit
        depends.

        Args:
            weights: (N, C), 0 where a logit is -inf.
            keep: whether another backward pass will follow, so that the graph is kept.
        """
        outputs = []
        for calls in self.calls.values():
            outputs += [output for _, output in calls]
        settings = {"retain_graph": keep, "allow_unused": True, "materialize_grads": True}
        flat = torch.autograd.grad(self.logits, outputs, weights.to(self.logits), **settings)
        remaining = iter(flat)  # in the order of slots and calls
        num_rows = len(self.logits)
        gradients: Calls = {name: [] for name in self.calls}
        for name, calls in self.calls.items():
            for a, _ in calls:
                g = _by_row(next(remaining), num_rows, name)
                gradients[name].append((_by_row(a, num_rows, name), g))
        return gradients

    def jacobian(self, weights: Tensor, *, keep: bool) -> dict[str, Tensor]:
        """J (N, out, in) of Σ_c weights_nc·logits_nc by slot name, from one backward pass."""
        gradients = self.gradients(weights, keep=keep)
        return {name: jacobian_of(calls) for name, calls in gradients.items()}


def jacobian_of(calls: list[tuple[Tensor, Tensor]]) -> Tensor:
    """J (N, out, in) of one slot, from inputs a and gradients g of its calls."""
    first, *others = [g.mT @ a for a, g in calls]
    return sum(others, first)


def _by_row(value: Tensor, num_rows: int, name: str) -> Tensor:
    """(sequences, …, width), each row's sequences adjacent, as (N, L, width) in float32 or more."""
    if value[..., 0].numel() % num_rows:
        raise Refusal(
            f"the slot {name} sees activations that do not divide into rows: got "
            f"{tuple(value.shape)} for {num_rows} rows; leave its layer out of target_modules"
        )
    wide = value.detach().to(torch.promote_types(value.dtype, torch.float32))
    return wide.reshape(num_rows, -1, value.shape[-1])


def traced(
    model: nn.Module, score: ClassLogits, inputs: Batch, slots: Mapping[str, nn.Module]
) -> Trace:
    """Runs a batch in evaluation mode with gradients, and keeps the slots' inputs and outputs.

    One row of the batch is also run alone, once for each kind of batch, to check that every slot
    sees the batch's rows along its first axis.

    Args:
        model: the model.
        score: maps (model, batch) to class logits (N, C).
        inputs: the batch of N rows.
        slots: the modules to watch, by slot name.

    Raises:
        OtherRows: if a slot sees something other than the batch's rows along its first axis; then
            only a batch of one row can be traced.
        Refusal: if no slot was called: the adapter is merged, disabled or not the active one.
    """
    compiled = is_compiled(model)
    model = unwrapped(model)
    verdicts = Verdicts.of(model)
    kind = ("gradients", kind_of(inputs, score, frozenset(slots)), coincidences(inputs, 1, model))
    with evaluating(model), eagerly(compiled):
        if verdicts.wrong(kind):
            _refuse_rows(next(iter(slots)))
        trace = _traced(model, score, inputs, slots)
        num_rows = len(trace.logits)
        comparable = num_rows > 1 and num_rows == num_rows_of(inputs)
        if comparable and verdicts.due(kind):
            row = some_rows(inputs, num_rows - 1, num_rows)
            alone = _traced(model, score, row, slots)
            score_of = partial(score, model)
            by_size = sizes_change(score_of, on_device(row, model), alone.logits, num_rows)
            verdicts.put(kind, _has_row(trace, alone, num_rows - 1, by_size, model))
            if verdicts.wrong(kind):
                _refuse_rows(next(iter(slots)))
    return trace


def _traced(
    model: nn.Module, score: ClassLogits, inputs: Batch, slots: Mapping[str, nn.Module]
) -> Trace:
    with torch.enable_grad(), _recording(slots) as calls:
        logits = checked(score(model, on_device(inputs, model)))
    if not calls:
        raise Refusal(
            f"none of the {len(slots)} slots was called in the forward pass: the adapter is "
            "merged, disabled or not active; unmerge it or call set_adapter"
        )
    return Trace(logits, calls)


def _has_row(
    trace: Trace, alone: Trace, place: int, by_size: Callable[[], Tensor], model: nn.Module
) -> bool:
    """Whether every slot saw of one row of a batch what it sees of the row alone.

    Args:
        trace: of the batch.
        alone: of the row.
        place: of the row in the batch.
        by_size: measures what a batch's size alone changes of the row's logits. Relative to them,
            activations may change as much; on these it cannot be measured, for it is in question
            which rows they are of.
        model: which was traced.
    """
    if trace.calls.keys() != alone.calls.keys():
        return False
    num_rows = len(trace.logits)
    relative_change = cache(lambda: finite_rms(by_size()) / finite_rms(alone.logits))
    for name, calls in trace.calls.items():
        calls_alone = alone.calls[name]
        if len(calls) != len(calls_alone):
            return False
        for (a, _), (a_alone, _) in zip(calls, calls_alone, strict=True):
            if a[..., 0].numel() % num_rows:
                return False
            in_batch = _by_row(a, num_rows, name)[place]
            by_itself = _by_row(a_alone, 1, name)[0]
            rounding = partial(_scaled, by_itself, relative_change)
            if agrees(in_batch[None], by_itself, 0, model, rounding) is False:
                return False
    return True


def _scaled(values: Tensor, factor: Callable[[], float]) -> Tensor:
    """Values times a factor, which is computed only when this is called."""
    return factor() * values


def _refuse_rows(name: str) -> None:
    raise OtherRows(
        "gradients row by row need layers that see the batch's rows along their first axis: got "
        f"slots such as {name} that see them in another order or mixed; give one row at a time"
    )


def num_rows_of(inputs: Batch) -> int:
    """How many rows a batch has; a tensor may have several entries for each row."""
    return min(len(value) for value in inputs.values())


def some_rows(inputs: Batch, start: int, stop: int) -> dict[str, Tensor]:
    """The rows from `start` to before `stop`; a tensor may have several adjacent entries a row."""
    num_rows = num_rows_of(inputs)
    sizes = {name: len(value) // num_rows for name, value in inputs.items()}
    return {name: inputs[name][start * size : stop * size] for name, size in sizes.items()}


@contextmanager
def _recording(slots: Mapping[str, nn.Module]) -> Iterator[Calls]:
    calls: Calls = {}

    def record(name: str, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:  # the first slot of a frozen adapter: the graph begins here
            output.requires_grad_()
        calls.setdefault(name, []).append((inputs[0].detach(), output))

    handles = [slot.register_forward_hook(partial(record, name)) for name, slot in slots.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
