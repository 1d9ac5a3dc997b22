"""Whether draws arrive: which layers a pass calls, with which rows, and why it called none."""

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
        self._several: int | None = None  # what one row brings where it brings several

    def take(self, name: str, leading: int) -> None:
        """Takes note of a call.

        A layer may see each row's tokens as rows of their own, if all layers that do see as many:
        experts see some tokens of some rows, and layers before which time leads see none.

        Raises:
            OtherRows: if what it was given cannot be the rows, draw by draw.
        """
        self.called.add(name)
        if self.draws == 1:
            return
        of_row, rest = divmod(leading, self.draws if self.rows is None else self.rows)
        if self.rows is not None and not rest and of_row > 1:
            self._several = self._several or of_row
            rest = of_row - self._several
        if rest or not of_row:
            expected = f"the pass's {self.rows}" if self.rows else f"a multiple of {self.draws}"
            raise OtherRows(
                f"the rows do not divide into draws: got {leading} rows, expected {expected}; "
                f"repeat the batch once for each draw; where the layer {name or 'at hand'} does "
                "not see the rows as its first axis, hold one draw at a time"
            )

    @contextmanager
    def expecting(self, rows: int) -> Iterator[None]:
        """Another number of rows for the time of a pass inside the pass."""
        before = (self.rows, self._several)
        self.rows = rows
        self._several = None
        try:
            yield
        finally:
            self.rows, self._several = before


def why_silent(layers: Mapping[str, Any], adapter: str) -> tuple[str, str] | None:
    """Why PEFT does not call an adapter's slots in these layers, and the remedy."""
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

    Raises:
        Refusal: if no drawn layer was called.
    """
    if arrivals.called:
        return
    found = arrivals.silent or why_silent(layers, adapter)
    if found is None:
        reason = "the model computes its layers without them (a fused or quantised kernel)"
        found = reason, "switch to the plain implementation of these layers"
    reason, remedy = found
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
    if layer is None:  # merged and unloaded: what is left is the mean
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
    """A layer that holds the adapter, found without a walk through all of the model."""
    if isinstance(model, LoraLayer):
        held = adapter in model.lora_A or adapter in model.lora_embedding_A
        return model if held else None
    found = (_first_layer(child, adapter) for child in model.children())
    return next((layer for layer in found if layer is not None), None)


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
