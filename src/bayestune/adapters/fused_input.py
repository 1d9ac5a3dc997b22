"""Gaussian layers that receive the same tensor, such as q_proj and v_proj, computed as one product."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bayestune.adapters.noise import random_signs

# Names of modules that attention and gated MLPs give one tensor, in Llama and most others, BERT and DistilBERT.
_ONE_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
)


class _RowProduct(torch.autograd.Function):
    """x (N, T, k) times A_nᵀ (N, k, r), with the gradient of A_n made as (N, r, k).

    Autograd would make it as (N, k, r): on the CPU in float32 that product is four to five times slower.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(input, weights)
        return torch.bmm(input, weights.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor]:
        (gradient,), (input, weights) = gradients, ctx.saved_tensors
        of_input = torch.bmm(gradient, weights) if ctx.needs_input_grad[0] else None
        return of_input, torch.bmm(gradient.transpose(1, 2), input)


class _RowNoise(torch.autograd.Function):
    """x (N, T, k) times A_nᵀ for A_n = M + (s_n t_nᵀ)∘(G∘G∘E), the law of `gaussian.row_weights`, in one node.

    The backward pass is written out: ∂M = Σ_n ∂A_n and ∂G = 2 G∘E∘Σ_n (s_n t_nᵀ)∘∂A_n. Autograd would take the same
    steps one by one and keep three float32 tensors of the draws' size (N, r, k) for them; this keeps G∘E, the signs,
    and the draws in the type of the product. The noise is drawn inside, so a checkpoint that restores the generator
    before it recomputes the pass gets the same draws.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, mean: Tensor, root_std: Tensor) -> Tensor:
        signs = random_signs(input.shape[0], sum(mean.shape), like=mean)
        sign_out, sign_in = _of_rows(signs, len(mean))
        half = root_std * torch.randn_like(mean)  # G∘E: half of ∂(G∘G∘E)/∂G
        weights = torch.addcmul(mean, sign_out, (root_std * half) * sign_in).to(input.dtype)
        ctx.save_for_backward(input, weights, signs, half)
        return torch.bmm(input, weights.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        (gradient,), (input, weights, signs, half) = gradients, ctx.saved_tensors
        of_input = torch.bmm(gradient, weights) if ctx.needs_input_grad[0] else None
        of_draws = torch.bmm(gradient.transpose(1, 2), input)
        of_mean = of_draws.sum(0, dtype=half.dtype)
        sign_out, sign_in = _of_rows(signs.to(of_draws.dtype), len(half))
        of_noise = of_draws.mul_(sign_in).mul_(sign_out).sum(0, dtype=half.dtype)
        return of_input, of_mean, of_noise.mul_(half).mul_(2)


def _of_rows(signs: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """s_n (N, r, 1) and t_n (N, 1, k) of the signs (N, r + k)."""
    return signs[:, :rank, None], signs[:, None, rank:]


class SharedInput:
    """Gaussian layers that are given the very same tensor, such as those of q_proj and v_proj, computed as one.

    Stacked they are one layer of all their ranks: one product reads the input once, and all small steps are taken once
    for all of them. The first of them computes all, the others take theirs if they are given the same tensor. Each has
    the law it has alone, and the layers' noises are independent in every row. What is done depends on nothing but the
    calls of one pass, so that a checkpoint's recomputation does the same again.

    Args:
        layers: with noise "row", the same width, type and device; the one that is called first in front.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = list(layers)
        self._input: Tensor | None = None
        self._ready: dict[int, Tensor] = {}

    def output(self, layer: nn.Module, input: Tensor) -> Tensor | None:
        """The layer's output (rows, …, r); None where it is to be computed alone."""
        first, *others = self.layers
        whole = all(one.training and type(one.weight) is nn.Parameter for one in self.layers)
        if (
            layer is first and whole
        ):  # else one is held at its mean, or weights are spread over devices
            output, *rest = self._outputs(input)
            self._input, self._ready = (
                input,
                {id(one): part for one, part in zip(others, rest, strict=True)},
            )
            return output
        if input is not self._input:
            self._ready = {}
        output = self._ready.pop(id(layer), None)  # a replica of a layer finds nothing
        self._input = self._input if self._ready else None
        return output

    def _outputs(self, input: Tensor) -> Sequence[Tensor]:
        mean = torch.cat([one.weight for one in self.layers])
        root_std = torch.cat([one.root_std for one in self.layers])
        return (
            self.layers[0]
            .noisy(input, mean, root_std)
            .split([one.out_features for one in self.layers], -1)
        )


def share_inputs(
    layers: Mapping[str, Any], owners: Mapping[str, Any], adapter: str
) -> Mapping[str, Any]:
    """Has layers that a block gives one tensor, by their names (path.lora_A), computed as one, see `SharedInput`.

    PEFT's layers at these paths, `owners`, say whether a slot gets its layer's input as it is: with dropout, or a base
    weight of another type than the adapter's, each slot is given a copy of its own.
    """
    together: dict[object, list[Any]] = {}
    for name, layer in layers.items():
        block, _, leaf = name.removesuffix(".lora_A").rpartition(".")
        family = next((names for names in _ONE_INPUT if leaf in names), None)
        if (
            family
            and layer.noise == "row"
            and _given_as_it_is(owners[f"{block}.{leaf}"], layer, adapter)
        ):
            key = block, family, layer.in_features, layer.weight.dtype, layer.weight.device
            together.setdefault(key, []).append(layer)
    for group in together.values():
        if len(group) > 1:
            shared = SharedInput(group)
            for layer in group:
                layer.shared = shared
    return layers


def _given_as_it_is(owner: Any, slot: Any, adapter: str) -> bool:
    base = getattr(owner.get_base_layer(), "weight", None)
    return (
        base is not None
        and base.dtype is slot.weight.dtype
        and isinstance(owner.lora_dropout[adapter], nn.Identity)
    )
