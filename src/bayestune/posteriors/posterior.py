"""What a posterior over adapters is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self

from torch import Tensor, nn

from bayestune.adapters import ADAPTER
from bayestune.forward import Batch, ClassLogits, Draws

State = tuple[dict[str, Tensor], dict[str, Any]]


@dataclass(frozen=True)
class Saved:
    """What a posterior is restored from: a model that holds the stock adapter already, and what `state` gave.

    Args:
        model: a PEFT model.
        score: maps (model, batch) to class logits (N, C).
        tensors: of the state.
        facts: of the state.
        adapter: which adapter.
    """

    model: nn.Module
    score: ClassLogits
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)
    adapter: str = ADAPTER


class Posterior(Protocol):
    """What every method's `fit` returns: a distribution over adapters, seen through its draws' logits.

    `atoms` is the number of draws that makes the predictive exact: 1 for a point, K for a mixture of K points; where
    draws cost nothing, a number that makes it precise; None where more draws are better and dearer. `state` gives what
    an artefact keeps beside the stock adapter, `restore` takes it back.
    """

    kind: ClassVar[str]

    @property
    def model(self) -> nn.Module:
        """The PEFT model."""
        ...

    @property
    def score(self) -> ClassLogits:
        """Maps (model, batch) to class logits (N, C)."""
        ...

    @property
    def fitted(self) -> Mapping[str, Any]:
        """What the fit reports: seconds, steps, log."""
        ...

    @property
    def adapter(self) -> str:
        """The name of its PEFT adapter."""
        ...

    @property
    def has_mean(self) -> bool:
        """Whether `Draws(0)`, the mean adapter, can be asked for."""
        ...

    @property
    def atoms(self) -> int | None:
        """See above."""
        ...

    def logits(self, inputs: Batch, draws: Draws) -> Tensor:
        """Class logits (S, N, C) of the draws; with `draws.count` 0 the mean's, (1, N, C)."""
        ...

    def state(self) -> State:
        """Tensors, and facts that JSON can hold."""
        ...

    @classmethod
    def restore(cls, saved: Saved) -> Self:
        """The posterior of what was saved."""
        ...


def check_shapes(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses tensors that are not of a model's slots.

    Raises:
        ValueError: if there are none, a name is not expected or a shape is another.
    """
    got = {name: tuple(value.shape) for name, value in tensors.items()}
    wrong = {name: shape for name, shape in got.items() if expected.get(name) != shape}
    if wrong or not got:
        name = next(iter(wrong), None)
        raise ValueError(
            f"of another model or rank: got {len(got)} tensors such as {name, got.get(name or '')}, "
            f"expected shapes such as {name, expected.get(name or '', 'no such slot')}"
        )
