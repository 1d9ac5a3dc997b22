"""Independent Gaussians in the adapter's slots: what BLoB, BBB, TFB and IVON return."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from bayestune.adapters import (
    GaussianLinear,
    Slots,
    exclusive,
    held_weights,
    make_gaussian,
    noise_of,
    refuse_inside_drawn,
    whole,
)
from bayestune.errors import Refusal
from bayestune.posteriors.posterior import AdapterPosterior, Saved, State, check_shapes


@dataclass
class Gaussian(AdapterPosterior):
    """q(A) = N(M, Ω²) on every Gaussian slot of the model that `bayesify` has converted.

    Args:
        model: the PEFT model.
        scorer: maps (model, batch) to class logits (N, C).
        adapter: the adapter's name; None for the active one.
        report: what the fit took.

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
        """One held draw M + Ω∘E of every Gaussian slot.

        Raises:
            Refusal: if σ is gone from the model, as PEFT's hotswap sets it to 0, or inside
                `drawn()`.
        """
        with exclusive(self.model):
            refuse_inside_drawn(self.model, self.adapter)
            layers = self.layers()
        self._refuse_without_std(layers)
        weights = {}
        for name, slot in layers.items():
            path = name.removesuffix(".lora_A")
            std = whole(slot.root_std).float().square()  # a loaded G is float32
            weights[name] = held_weights(whole(slot.weight), std, seed, index, path)
        return weights

    def _refuse_without_std(self, layers: Mapping[str, GaussianLinear]) -> None:
        """Refuses standard deviations of another shape, or of 0 that nobody set to 0."""
        fits = all(slot.weight.shape == slot.root_std.shape for slot in layers.values())
        if fits and any(slot.noiseless or whole(slot.root_std).any() for slot in layers.values()):
            return
        got = "standard deviations of 0" if fits else "standard deviations of another rank"
        raise Refusal(
            f"the adapter {self.adapter!r} has lost its noise: got {got} in {len(layers)} layers, "
            "expected positive ones of the weights' shapes; hotswap_adapter exchanges weights and "
            "sets to 0 what the new adapter does not have; use load_posterior instead"
        )

    def scale_std(self, roots: Mapping[str, Tensor], factor: float) -> None:
        """Sets Ω of every Gaussian slot to factor·G∘G.

        Args:
            roots: G (r, k) by slot name.
            factor: of the standard deviation; 0 makes the posterior a point.
        """
        for name, slot in self.layers().items():
            slot.set_root_std(roots[name] * math.sqrt(factor))

    def state(self) -> State:
        """G of each Gaussian slot, and how the training noise was made."""
        layers = self.layers()
        tensors = {f"{n}.root_std": whole(slot.root_std).detach() for n, slot in layers.items()}
        return tensors, noise_of(self.slots)

    @classmethod
    def restore(cls, saved: Saved) -> Self:
        """Converts the slots that the tensors name and gives them their standard deviation."""
        roots = saved.parts()["root_std"]
        check_shapes(roots, saved.shapes)
        make_gaussian(Slots(saved.model, saved.adapter), list(roots), **saved.facts)
        posterior = super().restore(saved)
        for name, slot in posterior.layers().items():
            slot.set_root_std(roots[name])
        return posterior
