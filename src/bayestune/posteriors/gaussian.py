"""Independent Gaussians in the adapter's slots: what BLoB, Bayes-by-backprop, TFB and IVON return."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from bayestune.adapters import ADAPTER, bayesify, gaussian_layers, held_weights, slots
from bayestune.forward import Batch, ClassLogits, DrawCache, Draws, drawn_logits
from bayestune.posteriors.posterior import Saved, State, check_shapes


@dataclass
class Gaussian:
    """q(A) = N(M, Ω²) on every Gaussian slot of the model, the others points.

    Args:
        model: a PEFT model that `bayesify` has converted.
        score: maps (model, batch) to class logits (N, C).
        fitted: what the fit reports: seconds, steps, log.
        adapter: which adapter.

    Raises:
        ValueError: if the model has no Gaussian layer.
    """

    kind: ClassVar[str] = "gaussian"
    model: nn.Module
    score: ClassLogits
    fitted: Mapping[str, Any] = field(default_factory=dict, repr=False)
    adapter: str = ADAPTER
    has_mean: bool = field(default=True, init=False)
    atoms: int | None = field(default=None, init=False)
    _held: DrawCache = field(default_factory=DrawCache, init=False, repr=False)

    def __post_init__(self) -> None:
        if not gaussian_layers(self.model, self.adapter):
            raise ValueError(
                "the model has no Gaussian layer: got a deterministic model; call bayesify(model) first"
            )

    def draw(self, index: int, seed: int = 0) -> dict[str, Tensor]:
        """The weights of one held draw by slot name, A (r, k) and B (d, r) if it is Gaussian, float32 on the CPU.

        Args:
            index: which draw, from 0.
            seed: of the set of draws.
        """
        return {
            name: held_weights(slot.weight, slot.std, seed, index, name.removesuffix(".lora_A"))
            for name, slot in gaussian_layers(self.model, self.adapter).items()
        }

    def logits(self, inputs: Batch, draws: Draws) -> Tensor:
        """The draws' logits (S, N, C), see `drawn_logits`; (1, N, C) for the mean."""
        return drawn_logits(self, inputs, draws, self._held)

    def state(self) -> State:
        """G of each Gaussian slot, and how the training noise was made."""
        layers = gaussian_layers(self.model, self.adapter)
        first = next(iter(layers.values()))
        tensors = {f"{name}.root_std": slot.root_std.detach() for name, slot in layers.items()}
        return tensors, {"noise": first.noise, "init_root_std": first.init_root_std}

    @classmethod
    def restore(cls, saved: Saved) -> Self:
        """Converts the slots that `tensors` name and gives them their standard deviation.

        Raises:
            ValueError: if the tensors are not of this model's slots or shapes.
        """
        model, adapter, tensors, facts = saved.model, saved.adapter, saved.tensors, saved.facts
        present, names = slots(model, adapter), [name.removesuffix(".root_std") for name in tensors]
        expected = {
            name: tuple(slot.get_parameter("weight").shape) for name, slot in present.items()
        }
        check_shapes(dict(zip(names, tensors.values(), strict=True)), expected)
        bayesify(
            model,
            init_root_std=facts["init_root_std"],
            noise=facts["noise"],
            adapter=adapter,
            slots=names,
        )
        with torch.no_grad():
            for name, slot in gaussian_layers(model, adapter).items():
                slot.root_std.copy_(tensors[f"{name}.root_std"])
        return cls(model, saved.score, adapter=adapter)
