"""A Gaussian over A drawn afresh for every token at prediction, as the public code of BLoB's authors does."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from bayestune.forms.gaussian import Gaussian
from bayestune.layers import Noise
from bayestune.lora import ADAPTER, evaluating, gaussian_layers
from bayestune.posterior import Batch, Draws, Saved, Scorer, State, mean_logits, on_device, seeded


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
    score: Scorer
    fitted: Mapping[str, Any] = field(default_factory=dict, repr=False)
    adapter: str = ADAPTER
    has_mean: bool = field(default=True, init=False)
    atoms: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if not gaussian_layers(self.model, self.adapter):
            raise ValueError("the model has no Gaussian layer: got a deterministic model; call bayesify(model) first")

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
