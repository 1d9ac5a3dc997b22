"""Gaussian layers that receive the same tensor, such as q_proj and v_proj, computed as one."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from bayestune.adapters.noise import FlipoutNoise
from bayestune.adapters.slots import Slots, split_name

Gradients = tuple[Tensor | None, Tensor]

# Modules that receive one tensor: in Llama and most others, BERT, DistilBERT.
_ONE_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
)


def _products(ctx: Any, gradient: Tensor, input: Tensor, weights: Tensor) -> Gradients:
    """∂x, if it is asked for, and ∂A_n of x·A_nᵀ."""
    of_input = torch.bmm(gradient, weights) if ctx.needs_input_grad[0] else None
    return of_input, torch.bmm(gradient.transpose(1, 2), input)


class RowProduct(torch.autograd.Function):
    """x (N, T, k) times A_nᵀ (N, k, r), with the gradient of A_n made as (N, r, k).

    Autograd would make it as (N, k, r): on the CPU in float32 that product is four to five times
    slower.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weights: Tensor) -> Tensor:  # noqa: D102
        ctx.save_for_backward(input, weights)
        return torch.bmm(input, weights.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Gradients:  # noqa: D102
        input, weights = ctx.saved_tensors
        return _products(ctx, gradients[0], input, weights)


class RowNoise(torch.autograd.Function):
    """x (N, T, k) times A_nᵀ for the flipout draws A_n = M + (s_n t_nᵀ)∘(G∘G∘E), in one node.

    Every A_n has the posterior N(M, (G∘G)²) as its marginal law, and two rows' noises are
    uncorrelated. The backward pass is written out: ∂M = Σ_n ∂A_n, ∂G = 2 G∘E∘Σ_n (s_n t_nᵀ)∘∂A_n.
    Autograd would take the same steps one by one and keep three float32 tensors of the draws' size
    (N, r, k); this keeps G∘E, the signs, and the draws in the type of the product.

    Reference:
        Wen, Vicol, Ba, Tran, Grosse: Flipout, ICLR 2018, https://arxiv.org/abs/1803.04386.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, input: Tensor, mean: Tensor, root_std: Tensor, of_rows: FlipoutNoise
    ) -> Tensor:
        noise, sign_out, sign_in = of_rows
        half = root_std * noise  # G∘E: half of ∂(G∘G∘E)/∂G
        draws = torch.addcmul(mean, sign_out[:, :, None], (root_std * half) * sign_in[:, None])
        weights = draws.to(input.dtype)
        ctx.save_for_backward(input, weights, half, sign_out, sign_in)
        return torch.bmm(input, weights.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        input, weights, half, sign_out, sign_in = ctx.saved_tensors
        of_input, of_draws = _products(ctx, gradients[0], input, weights)
        of_mean = of_draws.sum(0, dtype=half.dtype)
        sign_in = sign_in[:, None].to(of_draws.dtype)
        sign_out = sign_out[:, :, None].to(of_draws.dtype)
        of_noise = of_draws.mul_(sign_in).mul_(sign_out).sum(0, dtype=half.dtype)
        return of_input, of_mean, of_noise.mul_(half).mul_(2), None


class FusedInput:
    """Gaussian layers that receive the very same tensor, computed as one layer of all their ranks.

    The layer that is called first reads the input once and computes all; the others take their part
    if they receive the same tensor. Each has the law it has alone, and the layers' noises are
    independent in every row. What happens depends on nothing but the calls of one pass, so that a
    checkpoint's recomputation does the same again. The layers have noise "row" and the same width,
    type and device. Their noise in a pass is drawn as one, and a layer that is computed alone takes
    its ranks of it.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = layers
        self._input: Tensor | None = None
        self._ready: dict[int, Tensor] = {}
        self._ends = list(accumulate(one.out_features for one in layers))

    def __getstate__(self) -> dict[str, Any]:
        """A copy has none of the pass's tensors."""
        return {**self.__dict__, "_input": None, "_ready": {}}

    @property
    def rank(self) -> int:
        """Of all layers together."""
        return self._ends[-1]

    def ranks(self, place: int) -> slice:
        """Which of all ranks are those of one of the layers."""
        return slice(self._ends[place] - self.layers[place].out_features, self._ends[place])

    def output(self, layer: nn.Module, input: Tensor) -> Tensor | None:
        """The layer's output (rows, …, r); None where it is to be computed alone."""
        if input is not self._input:
            self._ready = {}
        output = self._ready.pop(id(layer), None)
        if output is None and self._may_compute(layer):
            mean = torch.cat([one.weight for one in self.layers])
            root_std = torch.cat([one.root_std for one in self.layers])
            ranks = [one.out_features for one in self.layers]
            parts = self.layers[0].noisy(input, mean, root_std, slice(None)).split(ranks, -1)
            self._ready = {id(one): part for one, part in zip(self.layers, parts, strict=True)}
            output = self._ready.pop(id(layer))
        self._input = input if self._ready else None
        return output

    def _may_compute(self, layer: nn.Module) -> bool:
        """Whether it is no replica, and no layer is at its mean or spread over devices."""
        noisy = all(one.training and type(one.weight) is nn.Parameter for one in self.layers)
        return noisy and any(one is layer for one in self.layers)


def fuse_inputs(slots: Slots, layers: Mapping[str, Any]) -> None:
    """Fuses the Gaussian layers, by slot name, that a block gives one tensor."""
    together: dict[object, list[Any]] = {}
    for name, layer in layers.items():
        path, side = split_name(name)
        block, _, leaf = path.rpartition(".")
        family = next((names for names in _ONE_INPUT if leaf in names), None)
        if side == "lora_A" and family and _receives_it_as_is(slots, path, layer):
            key = (block, family, layer.in_features, layer.weight.dtype, layer.weight.device)
            together.setdefault(key, []).append(layer)
    for group in together.values():
        fused = FusedInput(group) if len(group) > 1 else None
        for place, layer in enumerate(group):
            layer.fused = fused
            layer.ranks = fused.ranks(place) if fused else slice(None)


def _receives_it_as_is(slots: Slots, path: str, layer: Any) -> bool:
    """Whether PEFT hands a slot its layer's input itself; dropout and another type make a copy."""
    owner: Any = slots.layers[path]
    base = getattr(owner.get_base_layer(), "weight", None)
    same_type = base is not None and base.dtype is layer.weight.dtype
    return same_type and isinstance(owner.lora_dropout[slots.adapter], nn.Identity)
