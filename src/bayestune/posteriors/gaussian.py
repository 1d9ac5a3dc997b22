"""Independent Gaussians in the adapter's slots: what BLoB, BBB, TFB and IVON return."""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from bayestune.adapters import GaussianLinear, Slots, held_weights, make_gaussian, noise_of
from bayestune.errors import Refusal
from bayestune.posteriors.posterior import AdapterPosterior, Saved, State, check_shapes


@dataclass
class Gaussian(AdapterPosterior):
    """q(A) = N(M, Ω²) on every Gaussian slot of the model that `bayesify` has converted.

    Raises:
        Refusal: if the model has no Gaussian layer.
    """

    kind: ClassVar[str] = "gaussian"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.layers():
            raise Refusal(
                "the model has no Gaussian layer: got a deterministic model, expected one that "
                "bayesify(model) has converted; call it first"
            )

    def layers(self) -> dict[str, GaussianLinear]:
        """The Gaussian layers by slot name."""
        return self.slots.of_kind(GaussianLinear)

    def draw(self, index: int, seed: int = 0) -> dict[str, Tensor]:
        """One held draw M + Ω∘E of every Gaussian slot."""
        return {
            name: held_weights(slot.weight, slot.std, seed, index, name.removesuffix(".lora_A"))
            for name, slot in self.layers().items()
        }

    def state(self) -> State:
        """G of each Gaussian slot, and how the training noise was made."""
        layers = self.layers()
        tensors = {f"{name}.root_std": slot.root_std.detach() for name, slot in layers.items()}
        return tensors, noise_of(self.slots)

    @classmethod
    def restore(cls, saved: Saved) -> Self:
        """Converts the slots that the tensors name and gives them their standard deviation."""
        roots = saved.parts()["root_std"]
        check_shapes(roots, saved.shapes)
        make_gaussian(Slots(saved.model, saved.adapter), list(roots), **saved.facts)
        posterior = super().restore(saved)
        with torch.no_grad():
            for name, slot in posterior.layers().items():
                slot.root_std.copy_(roots[name])
        return posterior
