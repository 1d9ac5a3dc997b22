"""Posteriors whose draws are noisy passes: dropout masks or Gaussian noise for each token."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from bayestune.adapters import (
    GaussianLinear,
    Noise,
    Slots,
    check_arrived,
    eagerly,
    evaluating,
    watching,
)
from bayestune.errors import Refusal
from bayestune.forward import Batch, Draws, checked, on_device, repeat_rows, seeded
from bayestune.posteriors.gaussian import Gaussian
from bayestune.posteriors.posterior import Saved, SingleAdapter, State


@dataclass
class Dropout(SingleAdapter):
    """MC dropout in the paper's form: draws are passes with PEFT's LoRA dropout on.

    Each token of each row has masks of its own, so a draw is not an adapter. The masks come from
    torch's generator, seeded by (seed, the first draw of the pass): the same batches give the same
    logits, and other batches have other masks. For draws that are functions see `Scaled`.

    Raises:
        Refusal: if the adapter has no dropout: all draws would be the mean.
    """

    kind: ClassVar[str] = "dropout"
    by_batch = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any(module.p > 0 for module in dropouts(self.slots)):
            raise Refusal(
                "the adapter has no dropout: got lora_dropout=0, expected a probability above 0; "
                "set Lora(dropout=0.1)"
            )

    def _drawn(self, inputs: Batch, draws: Draws) -> Tensor:
        self.refuse_shared_prefix(draws)
        inputs = on_device(inputs, self.model)
        at_once = draws.at_once(inputs)
        parts = []
        slots = self.slots
        modules = dropouts(slots)
        watched = watching({str(number): module for number, module in enumerate(modules)})
        with eagerly(slots.compiled), watched as arrivals:
            for start in range(0, draws.count, at_once):
                size = min(at_once, draws.count - start)
                with evaluating(slots.model), seeded(slots.model, draws.seed, draws.first + start):
                    for module in modules:
                        module.train()
                    logits = checked(self.scorer(slots.model, repeat_rows(inputs, size)))
                parts.append(logits.unflatten(0, (size, -1)))
        check_arrived(arrivals, slots.layers, slots.adapter)
        return torch.cat(parts)

    @contextmanager
    def _beside(self, draws: Draws) -> Iterator[None]:
        slots = self.slots
        with eagerly(slots.compiled), seeded(slots.model, draws.seed, draws.first):
            for module in dropouts(slots):
                module.train()
            yield


def dropouts(slots: Slots) -> list[nn.Dropout]:
    """The adapter's dropout modules, one a layer; none where its probability is 0."""
    modules = [layer.lora_dropout[slots.adapter] for layer in slots.layers.values()]
    return [module for module in modules if isinstance(module, nn.Dropout)]


@dataclass
class TokenNoise(SingleAdapter):
    """BLoB's Gaussian drawn afresh for every token at prediction, as its authors' public code does.

    Token t of row n sees A_nt = M + (s_nt r_ntᵀ)∘(Ω∘E), with one E for each layer and pass, so two
    tokens' noises are uncorrelated, and a draw is not an adapter. The marginal law of each A_nt is
    that of `Gaussian`; the logits' law is another, for attention averages over tokens. E and the
    signs come from torch's generator, seeded by (seed, draw): the same batches give the same
    logits, and other batches have other noise. It serves comparisons with that code.

    Raises:
        Refusal: if the model has no Gaussian layer.
    """

    kind: ClassVar[str] = "token_noise"
    by_batch = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.state()  # refuses a deterministic model

    def _drawn(self, inputs: Batch, draws: Draws) -> Tensor:
        self.refuse_shared_prefix(draws)
        inputs = on_device(inputs, self.model)
        slots = self.slots
        by_name = slots.of_kind(GaussianLinear)
        layers = list(by_name.values())
        trained_with: list[Noise] = [layer.noise for layer in layers]
        passes = []
        drawing = layers[0].passes.drawing()
        try:
            with eagerly(slots.compiled), drawing, watching(by_name) as arrivals:
                for index in draws.indices:
                    with evaluating(slots.model), seeded(slots.model, draws.seed, index):
                        for layer in layers:
                            layer.noise = "token"
                            layer.training = True
                        passes.append(checked(self.scorer(slots.model, inputs)))
        finally:
            for layer, noise in zip(layers, trained_with, strict=True):
                layer.noise = noise
        check_arrived(arrivals, slots.layers, slots.adapter)
        return torch.stack(passes)

    def state(self) -> State:
        """That of the `Gaussian` on the same slots."""
        return Gaussian(self.model, self.scorer, adapter=self.adapter).state()

    @classmethod
    def restore(cls, saved: Saved) -> Self:
        """The posterior of a saved `state`."""
        Gaussian.restore(saved)
        return super().restore(saved)
