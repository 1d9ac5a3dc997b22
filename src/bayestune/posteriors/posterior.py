"""What a posterior over adapters is."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from bayestune.adapters import (
    ADAPTER,
    Slots,
    active,
    check_mean_arrives,
    drawn,
    evaluating,
    exclusive,
    refuse_inside_drawn,
    split_name,
    unwrapped,
)
from bayestune.errors import Refusal
from bayestune.forward import (
    Batch,
    ClassLogits,
    Draws,
    KeptDraws,
    drawn_logits,
    mean_logits,
    stacked,
)
from bayestune.posteriors.fit_report import FitReport

State = tuple[dict[str, Tensor], dict[str, Any]]

KINDS: dict[str, type["Posterior"]] = {}
"""The families of posteriors by the name that an artefact keeps; each subclass adds itself."""


@dataclass(frozen=True)
class Saved:
    """What a posterior is restored from.

    Args:
        model: the PEFT model, which holds the stock adapter.
        scorer: maps (model, batch) to class logits (N, C).
        tensors: of the posterior's `state`; each name is a slot's and a part's, such as
            "model.layers.0.self_attn.q_proj.lora_A.variance".
        facts: of the posterior's `state`.
        adapter: the adapter's name.
    """

    model: nn.Module
    scorer: ClassLogits
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]
    adapter: str = ADAPTER

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the adapter's slots."""
        return Slots(self.model, self.adapter).shapes()

    def parts(self) -> Mapping[str, dict[str, Tensor]]:
        """The tensors by part and slot name."""
        parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, value in self.tensors.items():
            slot, part = split_name(name)
            parts[part][slot] = value
        return parts


class Posterior(ABC):
    """What every method's `fit` returns: a distribution over adapters, seen through its logits.

    Attributes:
        kind: the family's name in artefacts, a key of `KINDS`.
        model: the PEFT model.
        scorer: maps (model, batch) to class logits (N, C).
        adapter: the name of its adapter.
        report: what its fit took.
        has_mean: whether `Draws(0)` gives the logits of a mean adapter.
        by_batch: whether a row's draws depend on the rows of its batch, as noise by token does.
        atoms: the number of draws where it is fixed: 1 of a point, whose predictive is then exact;
            1000 where draws cost nothing; of a mixture those of all members, if each has as many.
            None where more are better.
        digest: `posterior_digest` of the folder it comes from, if whoever loaded it set this.
    """

    kind: ClassVar[str]
    model: nn.Module
    scorer: ClassLogits
    adapter: str
    report: FitReport
    has_mean = True
    by_batch = False
    atoms: int | None = None
    digest: str | None = None

    def __init_subclass__(cls) -> None:
        if "kind" in vars(cls):
            KINDS[cls.kind] = cls

    @abstractmethod
    def logits(self, inputs: Batch, draws: Draws) -> Tensor:
        """Class logits (S, N, C) of a batch of N rows; the mean's, (1, N, C), for a count of 0."""

    def passes(self, draws: int) -> int:
        """How many passes of one adapter `draws` draws are; 1 for the mean."""
        return max(draws, 1)

    @abstractmethod
    def on(self, scorer: ClassLogits) -> Self:
        """The same posterior with another scorer."""

    @abstractmethod
    def state(self) -> State:
        """What an artefact keeps beside the stock adapter: tensors, and facts for JSON."""

    @classmethod
    @abstractmethod
    def restore(cls, saved: Saved) -> Self:
        """The posterior of a saved `state`.

        Raises:
            Refusal: if the tensors are not of this model's slots or shapes.
        """

    def side_by_side(self, draws: Draws) -> AbstractContextManager[float]:
        """A context in which the model, called on S·N rows draw by draw, runs the draws.

        The model is in evaluation mode, without gradients, and other threads wait. `generate` takes
        its steps in this context.

        Args:
            draws: which draws; with a count of 0 the model runs the mean.

        Returns:
            A context manager that gives the temperature by which to divide the logits.

        Raises:
            Refusal: if the draws cannot stand side by side.
        """
        raise Refusal(
            f"the draws of a {type(self).__name__} cannot stand side by side in one batch, so they "
            f"cannot generate: got draws={draws.count}, expected draws that are adapters, such as "
            "those of Gaussian, or dropout"
        )

    def refuse_shared_prefix(self, draws: Draws) -> None:
        """Refuses draws with a shared prefix, for posteriors whose draws are not adapters."""
        if draws.shared_prefix is not None:
            raise Refusal(
                f"{type(self).__name__} draws are not adapters, so they cannot share a prefix: got "
                f"shared_prefix={draws.shared_prefix}, expected None; leave it out"
            )


@dataclass
class SingleAdapter(Posterior):
    """A posterior around one adapter of a model, which holds its mean.

    Args:
        model: as of every posterior, and so are scorer and report.
        adapter: the adapter's name; None for the active one.
    """

    model: nn.Module
    scorer: ClassLogits
    _: KW_ONLY
    adapter: str = None  # type: ignore[assignment]
    report: FitReport = field(default_factory=FitReport, repr=False)

    def __post_init__(self) -> None:
        if self.adapter is None:
            self.adapter = self.slots.adapter

    @property
    def slots(self) -> Slots:
        """The adapter's slots, found anew."""
        return Slots(self.model, self.adapter)

    def logits(self, inputs: Batch, draws: Draws) -> Tensor:
        """As of every posterior; other threads on the same model wait.

        Raises:
            Refusal: if the adapter is disabled, or its slots hold other draws.
        """
        activated = active(self.model, self.adapter)
        with exclusive(self.model), activated, draws.precision(self.model):
            refuse_inside_drawn(self.model, self.adapter)
            check_mean_arrives(self.model, self.adapter)
            if draws.count == 0:
                return mean_logits(self.model, self.scorer, inputs)
            return self._drawn(inputs, draws)

    @abstractmethod
    def _drawn(self, inputs: Batch, draws: Draws) -> Tensor:
        """Logits (S, N, C) of one draw or more."""

    @contextmanager
    def side_by_side(self, draws: Draws) -> Iterator[float]:
        """As of every posterior.

        Raises:
            Refusal: as `logits`, or if the draws cannot stand side by side.
        """
        activated = active(self.model, self.adapter)
        model = unwrapped(self.model)
        with exclusive(model), activated, draws.precision(model), evaluating(model):
            refuse_inside_drawn(model, self.adapter)
            check_mean_arrives(model, self.adapter)
            with self._beside(draws) if draws.count else nullcontext():
                yield 1.0

    def _beside(self, draws: Draws) -> AbstractContextManager[Any]:
        """The part of `side_by_side` that a family adds: the model runs one draw or more in it."""
        return super().side_by_side(draws)

    def on(self, scorer: ClassLogits) -> Self:
        """The same posterior with another scorer."""
        return replace(self, scorer=scorer)

    def state(self) -> State:
        """Nothing beside the stock adapter."""
        return {}, {}

    @classmethod
    def restore(cls, saved: Saved) -> Self:
        """The posterior of a saved `state`."""
        return cls(saved.model, saved.scorer, adapter=saved.adapter)


@dataclass
class AdapterPosterior(SingleAdapter):
    """A posterior whose draws are adapters: they run together in one pass, and can be exported."""

    _kept: KeptDraws = field(
        default_factory=KeptDraws, init=False, repr=False, compare=False, kw_only=True
    )

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if name != "_kept":
            object.__setattr__(self, "_kept", KeptDraws())  # kept draws may have changed

    def __getstate__(self) -> dict[str, Any]:
        """All but the draws kept between batches, which no copy can use."""
        return {**vars(self), "_kept": KeptDraws()}

    @abstractmethod
    def draw(self, index: int, seed: int = 0) -> dict[str, Tensor]:
        """One held draw.

        Args:
            index: which draw of the set, from 0.
            seed: of the set of draws.

        Returns:
            The matrices that differ from the mean, by slot name: A (r, k) and B (d, r), float32 on
            the CPU.
        """

    def _drawn(self, inputs: Batch, draws: Draws) -> Tensor:
        return drawn_logits(self, inputs, draws, self._kept)

    def _beside(self, draws: Draws) -> AbstractContextManager[Any]:
        return drawn(self.model, stacked(self.draw, draws), self.adapter)


def check_shapes(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses tensors by slot name that do not have the shapes of a model's slots; also none."""
    got = {name: tuple(value.shape) for name, value in tensors.items()}
    unfit = [name for name, shape in got.items() if expected.get(name) != shape]
    if unfit or not got:
        name = unfit[0] if unfit else ""
        raise Refusal(
            f"of another model or rank: got {len(got)} tensors such as {name, got.get(name)}, "
            f"expected shapes such as {name, expected.get(name, 'no such slot')}"
        )


def unbound(*_: Any) -> Tensor:
    """The scorer of a posterior that was loaded without one."""
    raise Refusal(
        "the posterior has no scorer: got load_posterior(base, folder), expected a scorer as well"
    )
