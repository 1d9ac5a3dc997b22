"""Whether draws arrive: which layers a pass calls, with which rows, and why it called none."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

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
            expected = f"{self.rows} rows" if self.rows else f"a multiple of {self.draws}"
            raise OtherRows(
                f"the rows do not divide into draws: got a leading axis of {leading} in the layer "
                f"{name or 'at hand'}, expected {expected}; repeat the batch once for each draw, "
                "or put one draw at a time in the slots"
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
    found = why_silent(layers, adapter)
    if found is None:
        reason = "the model computes its layers without them (a fused or quantised kernel)"
        found = reason, "switch to the plain implementation of these layers"
    reason, remedy = found
    raise Refusal(
        f"the draws reach nothing: got a pass that called no slot of the adapter {adapter!r}, "
        f"because {reason}; expected the pass to use them; {remedy}"
    )
