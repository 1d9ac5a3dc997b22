"""What a posterior over adapters is, its draws' logits (S, N, C), and the predictive with its uncertainty."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from bayestune.common import CommonPrefix
from bayestune.lora import ADAPTER, evaluating

Batch = Mapping[str, Tensor]
Scorer = Callable[[nn.Module, Batch], Tensor]
State = tuple[dict[str, Tensor], dict[str, Any]]


@dataclass(frozen=True)
class Draws:
    """Which draws of a posterior, and how many rows may go through the model at once.

    Args:
        count: S; 0 means the mean.
        seed: of the set; draw i of one seed is always the same function.
        max_rows: at most so many rows (draws times rows) in one forward pass; None for no such bound.
        max_tokens: at most so many tokens (draws times rows times length) in one forward pass: the memory bound.
            A single draw of the batch always runs, whatever the bounds.
        first: the index of the first of the draws: `Draws(5, first=5)` goes on where `Draws(5)` ended.
        shared_prefix: m; an approximation where the mean adapter reads all but the last m tokens of the prompt, once
            for all draws, see `prefix.SharedPrefix`. None for exact draws.
    """

    count: int = 10
    seed: int = 0
    max_rows: int | None = None
    max_tokens: int = 16384
    first: int = 0
    shared_prefix: int | None = None

    def __post_init__(self) -> None:
        if self.count < 0 or self.first < 0:
            raise ValueError(
                f"draws are counted from 0: got count={self.count}, first={self.first}, expected neither to be "
                "negative; count=0 means the mean"
            )

    @property
    def indices(self) -> range:
        """Which draws of the set."""
        return range(self.first, self.first + self.count)

    def refuse_prefix(self, posterior: object) -> None:
        """For posteriors whose draws are no adapters.

        Raises:
            ValueError: if a shared prefix is asked for.
        """
        if self.shared_prefix is not None:
            raise ValueError(
                f"draws of {type(posterior).__name__} are no adapters and cannot share a prefix: got "
                f"shared_prefix={self.shared_prefix}, expected None"
            )

    def at_once(self, inputs: Batch) -> int:
        """How many draws of this batch run in one pass, at least 1."""
        rows, tokens = inputs["input_ids"].shape[0], inputs["input_ids"].numel()
        bound = min(self.count, self.max_tokens // tokens)
        return max(1, bound if self.max_rows is None else min(bound, self.max_rows // rows))


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
    score: Scorer
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
    def score(self) -> Scorer:
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


class Drawable(Posterior, Protocol):
    """A posterior whose draws are adapters."""

    def draw(self, index: int, seed: int = 0) -> dict[str, Tensor]:
        """One held draw by slot name, what differs from the mean: A (r, k), B (d, r)."""
        ...


def mean_logits(posterior: Posterior, inputs: Batch) -> Tensor:
    """The logits (1, N, C) of the adapter as it stands, in evaluation mode."""
    with evaluating(posterior.model), CommonPrefix.of_mean(posterior.model).sharing(posterior.model):
        return posterior.score(posterior.model, on_device(inputs, posterior.model))[None]


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


@contextmanager
def seeded(model: nn.Module, seed: int, index: int) -> Iterator[None]:
    """Seeds torch's generators by (seed, index) for the time of the context; the caller's random state is kept."""
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type != "cpu" else [], device_type=device.type):
        torch.manual_seed(1_000_003 * seed + index)
        yield


def on_device(inputs: Batch, model: nn.Module) -> dict[str, Tensor]:
    """The batch on the model's device."""
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in inputs.items()}


@dataclass(frozen=True)
class Prediction:
    """Averaged probabilities and the uncertainty of each row; entropies in nats.

    Args:
        probabilities: mean over draws of softmax(logits), (N, C).
        total_entropy: entropy of the averaged probabilities, (N,).
        expected_entropy: mean entropy of the draws' probabilities (aleatoric), (N,).
        mutual_information: their difference (epistemic), (N,); 0 for a single draw.
    """

    probabilities: Tensor
    total_entropy: Tensor
    expected_entropy: Tensor
    mutual_information: Tensor

    @property
    def confidence(self) -> Tensor:
        """The largest probability of each row, (N,)."""
        return self.probabilities.amax(-1)

    @property
    def choice(self) -> Tensor:
        """The index of the largest probability of each row, (N,)."""
        return self.probabilities.argmax(-1)

    @classmethod
    def of(cls, logits: Tensor) -> "Prediction":
        """The predictive of the draws' logits (S, N, C), in float64; -inf marks an option that a row has not.

        Example:
            >>> two_sure_draws_that_disagree = torch.tensor([[[30.0, 0.0]], [[0.0, 30.0]]])
            >>> prediction = Prediction.of(two_sure_draws_that_disagree)
            >>> prediction.probabilities.tolist(), round(prediction.mutual_information.item(), 4)
            ([[0.5, 0.5]], 0.6931)
        """
        draws = logits.double().softmax(-1)
        probabilities = draws.mean(0)
        total, expected = _entropy(probabilities), _entropy(draws).mean(0)
        return cls(probabilities, total, expected, (total - expected).clamp_min(0))


def _entropy(probabilities: Tensor) -> Tensor:
    return torch.special.entr(probabilities).sum(-1)


def count_for(posterior: Posterior, draws: int) -> int:
    """How many draws to take where so many are asked for: the posterior's `atoms` if it has some; 0 is the mean.

    Raises:
        ValueError: if the mean is asked for and there is none.
    """
    if draws == 0 and not posterior.has_mean:
        raise ValueError(f"draws=0 means the mean, but {type(posterior).__name__} has none: ask for draws=1 or more")
    return draws if posterior.atoms is None or draws == 0 else posterior.atoms


def predict(
    posterior: Posterior,
    inputs: Batch,
    draws: int = 10,
    *,
    seed: int = 0,
    max_rows: int | None = None,
    max_tokens: int = 16384,
    shared_prefix: int | None = None,
) -> Prediction:
    """Averages the probabilities of held draws: p(y | x) ≈ 1/S Σ_s softmax(f(x; A_s)).

    Args:
        posterior: what a method's `fit` returned, or a loaded one.
        inputs: a batch of N rows, as its scorer collates them.
        draws: S; 0 for the mean adapter. A posterior with `atoms` is averaged over those instead.
        seed: of the set of draws; the same seed gives the same S functions for every batch.
        max_rows: bound on the rows of one forward pass.
        max_tokens: bound on the tokens of one forward pass.
        shared_prefix: m; an approximation, off by default: the mean adapter reads all but the last m tokens of the
            prompt, once for all draws. It draws less noise; docs/calibration_cost.md shows what is lost and saved.

    Returns:
        Probabilities (N, C), and total, expected and mutual-information entropy (N,) in nats.

    Raises:
        ValueError: if `draws` is negative, or 0 for a posterior without a mean, or a prefix cannot be shared.
    """
    count = count_for(posterior, draws)
    which = Draws(count, seed, max_rows, max_tokens, shared_prefix=shared_prefix)
    return Prediction.of(posterior.logits(inputs, which))
