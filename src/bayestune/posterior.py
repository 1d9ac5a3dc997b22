"""Posteriors over adapters, their draws' logits (S, N, C), and the predictive with its uncertainty."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bayestune.gaussian import held_weights
from bayestune.lora import ADAPTER, drawn, evaluating, gaussian_layers

Batch = Mapping[str, Tensor]
Scorer = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Draws:
    """Which draws of a posterior, and how many rows may go through the model at once.

    Args:
        count: S; 0 means the mean.
        seed: of the set; draw i of one seed is always the same function.
        max_rows: at most so many rows (draws times rows) in one forward pass; None for no such bound.
        max_tokens: at most so many tokens (draws times rows times length) in one forward pass: the memory bound.
            A single draw of the batch always runs, whatever the bounds.
    """

    count: int = 10
    seed: int = 0
    max_rows: int | None = None
    max_tokens: int = 16384

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"the number of draws must not be negative: got {self.count}; 0 means the mean")

    def at_once(self, inputs: Batch) -> int:
        """How many draws of this batch run in one pass, at least 1."""
        rows, tokens = inputs["input_ids"].shape[0], inputs["input_ids"].numel()
        bound = min(self.count, self.max_tokens // tokens)
        return max(1, bound if self.max_rows is None else min(bound, self.max_rows // rows))


class Posterior(Protocol):
    """What every method's `fit` returns: a distribution over adapters, seen through its draws' logits."""

    model: nn.Module
    score: Scorer
    fitted: Mapping[str, Any]
    has_mean: bool

    def logits(self, inputs: Batch, draws: Draws) -> Tensor:
        """Class logits (S, N, C) of the draws; with `draws.count` 0 the mean's, (1, N, C)."""
        ...


@dataclass
class Point:
    """A posterior with all its mass on one adapter: what maximum likelihood and MAP return.

    Args:
        model: a PEFT model.
        score: maps (model, batch) to class logits (N, C).
        fitted: what the fit reports: seconds, steps, log.
    """

    model: nn.Module
    score: Scorer
    fitted: Mapping[str, Any] = field(default_factory=dict, repr=False)
    has_mean: bool = field(default=True, init=False)

    def logits(self, inputs: Batch, draws: Draws) -> Tensor:
        """The adapter's logits, the same for every draw: (S, N, C), (1, N, C) for the mean."""
        with evaluating(self.model):
            logits = self.score(self.model, on_device(inputs, self.model))
        return logits.expand(max(1, draws.count), *logits.shape)


@dataclass
class Gaussian:
    """q(A) = N(M, Ω²) on every Gaussian layer of the model, B a point.

    Args:
        model: a PEFT model that `bayesify` has converted.
        score: maps (model, batch) to class logits (N, C).
        fitted: what the fit reports: seconds, steps, log.
        adapter: which adapter.

    Raises:
        ValueError: if the model has no Gaussian layer.
    """

    model: nn.Module
    score: Scorer
    fitted: Mapping[str, Any] = field(default_factory=dict, repr=False)
    adapter: str = ADAPTER
    has_mean: bool = field(default=True, init=False)
    _held: tuple[object, dict[str, Tensor]] = field(default=(None, {}), init=False, repr=False)

    def __post_init__(self) -> None:
        if not gaussian_layers(self.model, self.adapter):
            raise ValueError("the model has no Gaussian layer: got a deterministic model; call bayesify(model) first")

    def draw(self, index: int, seed: int = 0) -> dict[str, Tensor]:
        """The weights A of one held draw, by layer path, each (r, k) in float32 on the CPU.

        Args:
            index: which draw, from 0.
            seed: of the set of draws.
        """
        return {
            path: held_weights(layer.weight, layer.std, seed, index, path)
            for path, layer in gaussian_layers(self.model, self.adapter).items()
        }

    def stack(self, count: int, seed: int = 0) -> dict[str, Tensor]:
        """The draws 0…S-1 as one stack (S, r, k) for each layer path; kept until the posterior changes."""
        layers = gaussian_layers(self.model, self.adapter)
        versions = tuple((id(p), p._version) for layer in layers.values() for p in (layer.weight, layer.root_std))
        if self._held[0] != (count, seed, versions):
            draws = [self.draw(index, seed) for index in range(count)]
            self._held = (count, seed, versions), {path: torch.stack([d[path] for d in draws]) for path in layers}
        return self._held[1]

    def logits(self, inputs: Batch, draws: Draws) -> Tensor:
        """The draws' logits (S, N, C), S·N rows in one pass within the bounds of `draws`; (1, N, C) for the mean."""
        if draws.count == 0:
            return Point(self.model, self.score).logits(inputs, draws)
        stack, step = self.stack(draws.count, draws.seed), draws.at_once(inputs)
        chunks = []
        for start in range(0, draws.count, step):
            part = {path: weights[start : start + step] for path, weights in stack.items()}
            size = min(step, draws.count - start)
            with evaluating(self.model), drawn(self.model, part, self.adapter):
                logits = self.score(self.model, repeat_rows(on_device(inputs, self.model), size))
            chunks.append(logits.unflatten(0, (size, -1)))
        return torch.cat(chunks)


def on_device(inputs: Batch, model: nn.Module) -> dict[str, Tensor]:
    """The batch on the model's device."""
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in inputs.items()}


def repeat_rows(inputs: Batch, times: int) -> dict[str, Tensor]:
    """The batch `times` over along the leading axis: (N, …) to (times·N, …), copy by copy."""
    return {name: value.repeat(times, *[1] * (value.dim() - 1)) for name, value in inputs.items()}


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


def predict(
    posterior: Posterior,
    inputs: Batch,
    draws: int = 10,
    *,
    seed: int = 0,
    max_rows: int | None = None,
    max_tokens: int = 16384,
) -> Prediction:
    """Averages the probabilities of held draws: p(y | x) ≈ 1/S Σ_s softmax(f(x; A_s)).

    Args:
        posterior: what a method's `fit` returned, or a loaded one.
        inputs: a batch of N rows, as its scorer collates them.
        draws: S; 0 for the mean adapter.
        seed: of the set of draws; the same seed gives the same S functions for every batch.
        max_rows: bound on the rows of one forward pass.
        max_tokens: bound on the tokens of one forward pass.

    Returns:
        Probabilities (N, C), and total, expected and mutual-information entropy (N,) in nats.

    Raises:
        ValueError: if `draws` is negative, or 0 for a posterior without a mean.
    """
    if draws == 0 and not posterior.has_mean:
        raise ValueError(f"draws=0 means the mean, but {type(posterior).__name__} has none: ask for draws=1 or more")
    return Prediction.of(posterior.logits(inputs, Draws(draws, seed, max_rows, max_tokens)))
