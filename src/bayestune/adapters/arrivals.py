"""Whether draws take part in a pass: which layers it calls, with which rows, and why none."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from bayestune.errors import Refusal


class OtherRows(Refusal):
    """A layer sees another leading size than a pass's rows: draws cannot share this pass."""


class Arrivals:
    """What the drawn layers see of one pass over S draws.

    Args:
        draws: S.
        rows: S·N, the sequences that go through the model; None where they are not known.
    """

    def __init__(self, draws: int, rows: int | None = None) -> None:
        self.draws = draws
        self.rows = rows
        self.called: set[str] = set()
        self.silent: tuple[str, str] | None = None  # why a pass called none, and the remedy
        self._tokens_per_row: int | None = None  # in layers that see tokens as their leading axis

    def take(self, name: str, leading: int) -> None:
        """Notes a call, and checks that its input begins with the rows, draw by draw.

        A layer may see all rows' tokens as one leading axis, (S·N·T, k), if all such layers see the
        same T. Experts, which see some tokens of some rows, and layers whose inputs begin with time
        are caught by this.

        Args:
            name: the slot's.
            leading: the size of its input's first axis.

        Raises:
            OtherRows: if the first axis cannot be the rows, draw by draw.
        """
        self.called.add(name)
        if self.draws == 1:
            return
        expected_rows = self.draws if self.rows is None else self.rows
        per_row, rest = divmod(leading, expected_rows)
        fits = per_row > 0 and rest == 0
        if fits and per_row > 1 and self.rows is not None:
            self._tokens_per_row = self._tokens_per_row or per_row
            fits = per_row == self._tokens_per_row
        if not fits:
            expected = f"the pass's {self.rows}" if self.rows else f"a multiple of {self.draws}"
            raise OtherRows(
                f"the rows do not divide into draws: got {leading} rows, expected {expected}; "
                f"repeat the batch once for each draw; where the layer {name or 'at hand'} does "
                "not see the rows as its first axis, hold one draw at a time"
            )

    @contextmanager
    def expecting(self, rows: int) -> Iterator[None]:
        """Another number of rows for the time of a pass inside the pass."""
        before = (self.rows, self._tokens_per_row)
        self.rows = rows
        self._tokens_per_row = None
        try:
            yield
        finally:
            self.rows, self._tokens_per_row = before


def why_silent(layers: Mapping[str, Any], adapter: str) -> tuple[str, str] | None:
    """Why PEFT does not call an adapter's slots, and the remedy; None if the layers do not tell.

    Args:
        layers: the LoRA layers that hold the adapter, by path.
        adapter: the adapter's name.
    """
    if not layers:
        reason = f"no layer of the model holds the adapter {adapter!r} (any more)"
        return reason, "load the posterior anew, merge_and_unload() and unload() take it off"
    for path, layer in layers.items():
        if layer.disable_adapters:
            reason = f"the adapters are disabled in {path}"
            return reason, "leave disable_adapter(), or call enable_adapter_layers()"
        if layer.merged:
            reason = f"an adapter is merged into the weights of {path}"
            return reason, "call unmerge_adapter()"
        if adapter not in layer.active_adapters:
            reason = f"the active adapters of {path} are {list(layer.active_adapters)}"
            return reason, f"call set_adapter({adapter!r})"
    return None


def check_arrived(arrivals: Arrivals, layers: Mapping[str, nn.Module], adapter: str) -> None:
    """Refuses a pass in which the draws reached no layer.

    Args:
        arrivals: what was noted of the pass.
        layers: the LoRA layers that hold the adapter, by path.
        adapter: the adapter's name.

    Raises:
        Refusal: if no drawn layer was called.
    """
    if arrivals.called:
        return
    explanation = arrivals.silent or why_silent(layers, adapter)
    reason, remedy = explanation or (
        "the model computes its layers without them (a fused or quantised kernel)",
        "switch to the plain implementation of these layers",
    )
    raise Refusal(
        f"the draws reach nothing: got a pass that called no slot of the adapter {adapter!r}, "
        f"because {reason}; expected the pass to use them; {remedy}"
    )


def check_mean_arrives(model: nn.Module, adapter: str) -> None:
    """Refuses passes of a mean that would be the base's, or another adapter's.

    Raises:
        Refusal: if the adapter is disabled or not active, or others are merged without it.
    """
    layer = _first_layer(model, adapter)
    if layer is None:  # merged and unloaded: the weights hold the mean
        return
    merged = list(layer.merged_adapters)
    if layer.disable_adapters:
        got = "the adapters disabled"
        remedy = "leave disable_adapter(), or call enable_adapter_layers()"
    elif merged and adapter not in merged:
        got = f"the adapters {merged} merged into the weights"
        remedy = "call unmerge_adapter()"
    elif not merged and adapter not in layer.active_adapters:
        got = f"the adapters {list(layer.active_adapters)} active"
        remedy = f"call set_adapter({adapter!r})"
    else:
        return
    raise Refusal(f"a pass would not use the adapter {adapter!r}: got {got}; {remedy}")


def _first_layer(model: nn.Module, adapter: str) -> Any:
    """The first layer that holds the adapter; the search, made in each pass, stops there."""
    if isinstance(model, LoraLayer):
        holds = adapter in model.lora_A or adapter in model.lora_embedding_A
        return model if holds else None
    for child in model.children():
        layer = _first_layer(child, adapter)
        if layer is not None:
            return layer
    return None


@contextmanager
def watching(modules: Mapping[str, nn.Module]) -> Iterator[Arrivals]:
    """Notes which modules are called in the context's passes."""
    arrivals = Arrivals(1)
    hooks = []
    for name, module in modules.items():
        note = partial(_note, arrivals, name)
        hooks.append(module.register_forward_pre_hook(note))
    try:
        yield arrivals
    finally:
        for hook in hooks:
            hook.remove()


def _note(arrivals: Arrivals, name: str, *_: object) -> None:
    arrivals.called.add(name)
