"""Posteriors whose draws are noisy passes instead of adapters: dropout masks or Gaussian noise for each token."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from bayestune.adapters import ADAPTER, Noise, adapted_layers, evaluating, gaussian_layers
from bayestune.forward import Batch, ClassLogits, Draws, mean_logits, on_device, repeat_rows, seeded
from bayestune.posteriors.gaussian import Gaussian
from bayestune.posteriors.posterior import Saved, State


@dataclass
class Dropout:
    """Draws are passes with LoRA's dropout on: each token of each row has masks of its own, so a draw is no adapter.

    The masks come from torch's generator, seeded by (seed, the first draw of the pass): the same batches give the same
    logits, another batching other masks. For draws that are functions see `forms.scaled`.

    Args:
        model: a PEFT model with `lora_dropout` > 0.
        score: maps (model, batch) to class logits (N, C).
        fitted: what the fit reports.
        adapter: which adapter.

    Raises:
        ValueError: if the adapter has no dropout: all draws would be the mean.
    """

    kind: ClassVar[str] = "dropout"
    model: nn.Module
    score: ClassLogits
    fitted: Mapping[str, Any] = field(default_factory=dict, repr=False)
    adapter: str = ADAPTER
    has_mean: bool = field(default=True, init=False)
    atoms: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if not any(module.p > 0 for module in dropouts(self.model, self.adapter)):
            raise ValueError(
                "the adapter has no dropout: got lora_dropout=0, expected more; set Lora(dropout=0.1)"
            )

    def logits(self, inputs: Batch, draws: Draws) -> Tensor:
        """The draws' logits (S, N, C), S·N rows in one pass within the bounds of `draws`; (1, N, C) for the mean."""
        if draws.count == 0:
            return mean_logits(self, inputs)
        draws.refuse_prefix(self)
        step, chunks, inputs = draws.at_once(inputs), [], on_device(inputs, self.model)
        for start in range(0, draws.count, step):
            size = min(step, draws.count - start)
            with evaluating(self.model), self._dropping(draws.seed, draws.first + start):
                chunks.append(
                    self.score(self.model, repeat_rows(inputs, size)).unflatten(0, (size, -1))
                )
        return torch.cat(chunks)

    @contextmanager
    def _dropping(self, seed: int, first: int) -> Iterator[None]:
        """Switches LoRA's dropout on, nothing else, with seeded masks; the caller's random state is kept."""
        with seeded(self.model, seed, first):
            for module in dropouts(self.model, self.adapter):
                module.train()
            yield

    def state(self) -> State:
        """Nothing: the adapter's configuration holds the dropout's probability."""
        return {}, {}

    @classmethod
    def restore(cls, saved: Saved) -> Self:  # noqa: D102
        return cls(saved.model, saved.score, adapter=saved.adapter)


def dropouts(model: nn.Module, adapter: str = ADAPTER) -> list[nn.Dropout]:
    """The adapter's dropout modules, one a layer; none where its probability is 0."""
    modules = [layer.lora_dropout[adapter] for layer in adapted_layers(model, adapter).values()]
    return [module for module in modules if isinstance(module, nn.Dropout)]


@dataclass
class TokenNoise:
    """Draws are passes with the Gaussian layers stochastic, each token under signs of its own: a draw is no adapter.

    Token t of row n sees A_nt = M + (s_nt r_ntᵀ)∘(Ω∘E), with one E for each layer and pass, so two tokens' noises are
    uncorrelated. The marginal law of each A_nt is that of `Gaussian`; the logits' law is another, for attention
    averages over tokens. E and the signs come from torch's generator, seeded by (seed, draw): the same batches give
    the same logits, another batching other noise. It is there to compare with; draws of `Gaussian` are functions.

    Args:
        model: a PEFT model that `bayesify` has converted.
        score: maps (model, batch) to class logits (N, C).
        fitted: what the fit reports.
        adapter: which adapter.

    Raises:
        ValueError: if the model has no Gaussian layer.
    """

    kind: ClassVar[str] = "token_noise"
    model: nn.Module
    score: ClassLogits
    fitted: Mapping[str, Any] = field(default_factory=dict, repr=False)
    adapter: str = ADAPTER
    has_mean: bool = field(default=True, init=False)
    atoms: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if not gaussian_layers(self.model, self.adapter):
            raise ValueError(
                "the model has no Gaussian layer: got a deterministic model; call bayesify(model) first"
            )

    def logits(self, inputs: Batch, draws: Draws) -> Tensor:
        """The draws' logits (S, N, C), a pass for each draw; (1, N, C) for the mean."""
        if draws.count == 0:
            return mean_logits(self, inputs)
        draws.refuse_prefix(self)
        inputs, passes = on_device(inputs, self.model), []
        for index in draws.indices:
            with evaluating(self.model), self._noisy(draws.seed, index):
                passes.append(self.score(self.model, inputs))
        return torch.stack(passes)

    @contextmanager
    def _noisy(self, seed: int, index: int) -> Iterator[None]:
        """Switches the layers' noise on, nothing else; `evaluating` gives their mode back, this one their kind."""
        layers = list(gaussian_layers(self.model, self.adapter).values())
        kinds: list[Noise] = [layer.noise for layer in layers]
        with seeded(self.model, seed, index):
            try:
                for layer in layers:
                    layer.noise, layer.training = "token", True
                yield
            finally:
                for layer, kind in zip(layers, kinds, strict=True):
                    layer.noise = kind

    def state(self) -> State:
        """As of `Gaussian`."""
        return Gaussian(self.model, self.score, adapter=self.adapter).state()

    @classmethod
    def restore(cls, saved: Saved) -> Self:  # noqa: D102
        Gaussian.restore(saved)
        return cls(saved.model, saved.score, adapter=saved.adapter)
