"""Gaussian layers that receive the same tensor, such as q_proj and v_proj, computed as one."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bayestune.adapters.drawn_linear import compute_dtype
from bayestune.adapters.noise import FlipoutNoise
from bayestune.adapters.one_pass import Call
from bayestune.adapters.slots import Slots, split_name
from bayestune.adapters.spread import is_partitioned

Gradients = tuple[Tensor | None, Tensor]

# Modules that receive one tensor: in Llama and most others, BERT, DistilBERT.
_ONE_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
)


def _product_gradients(ctx: Any, gradient: Tensor, input: Tensor, weights: Tensor) -> Gradients:
    """The gradients of x·A_nᵀ: ∂x, if autograd needs it, and ∂A_n."""
    grad_input = torch.bmm(gradient, weights) if ctx.needs_input_grad[0] else None
    return grad_input, torch.bmm(gradient.transpose(1, 2), input)


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
        return _product_gradients(ctx, gradients[0], input, weights)


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
        ctx: Any, input: Tensor, mean: Tensor, root_std: Tensor, noise: FlipoutNoise
    ) -> Tensor:
        weights, half = _drawn(mean, root_std, noise, input.dtype)
        ctx.save_for_backward(input, weights, half, noise.sign_out, noise.sign_in)
        return torch.bmm(input, weights.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        input, weights, *half_and_signs = ctx.saved_tensors
        grad_input, grad_draws = _product_gradients(ctx, gradients[0], input, weights)
        return grad_input, *_gaussian_gradients(grad_draws, *half_and_signs), None


class RowDraws(torch.autograd.Function):
    """The flipout draws A_n (N, r, k) themselves, for layers that share them but not their input.

    `RowNoise` without the product; the backward pass is the same.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, mean: Tensor, root_std: Tensor, noise: FlipoutNoise, dtype: torch.dtype
    ) -> Tensor:
        weights, half = _drawn(mean, root_std, noise, dtype)
        ctx.save_for_backward(half, noise.sign_out, noise.sign_in)
        return weights

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        return *_gaussian_gradients(gradients[0].clone(), *ctx.saved_tensors), None, None


def _drawn(
    mean: Tensor, root_std: Tensor, noise: FlipoutNoise, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The draws (N, r, k) in a type, and G∘E (r, k): half of ∂(G∘G∘E)/∂G."""
    shared, sign_out, sign_in = noise
    half = root_std * shared
    draws = torch.addcmul(mean, sign_out[:, :, None], (root_std * half) * sign_in[:, None])
    return draws.to(dtype), half


def _gaussian_gradients(
    grad_draws: Tensor, half: Tensor, sign_out: Tensor, sign_in: Tensor
) -> tuple[Tensor, Tensor]:
    """∂M and ∂G from ∂A_n (N, r, k), which is overwritten."""
    grad_mean = grad_draws.sum(0, dtype=half.dtype)
    sign_in = sign_in[:, None].to(grad_draws.dtype)
    sign_out = sign_out[:, :, None].to(grad_draws.dtype)
    signed = grad_draws.mul_(sign_in).mul_(sign_out).sum(0, dtype=half.dtype)
    return grad_mean, signed.mul_(half).mul_(2)


class _Draws(NamedTuple):
    """A layer's ranks of the draws of all layers, and how its input is put into blocks."""

    weights: Tensor  # (B, r, k)
    call: Call

    def output(self, input: Tensor) -> Tensor:
        """The layer's output (rows, …, r) for an input (rows, …, k) of its own."""
        blocks = self.call.in_blocks(input).to(self.weights.dtype)
        return self.call.shaped(RowProduct.apply(blocks, self.weights))  # type: ignore[arg-type]


class FusedInput:
    """Gaussian layers whose owners receive the very same tensor, computed as one of all ranks.

    The layer that is called first reads the tensor once and computes the outputs of all; each other
    one takes its part if it receives the same tensor. A layer's output has the same law as if it
    were computed alone, and the layers' noises are independent in every row. All this depends only
    on the calls of one pass, so that a checkpoint's recomputation repeats it. The noise of all
    layers in a pass is drawn together, and a layer that is computed alone uses its own ranks of it.

    Where adapter and activations differ in type, PEFT gives each layer a copy of the tensor. So
    hooks on the owners, PEFT's LoRA layers, note which tensor it is a copy of. Under LoRA dropout
    each layer's input has a mask of its own: then the first layer called makes the draws of all,
    and each layer applies its ranks of them to its own input.

    Args:
        layers: the Gaussian layers, with noise "row" and the same width, type and device.
        dropped: whether their inputs go through LoRA dropout.
    """

    def __init__(self, layers: Sequence[Any], *, dropped: bool = False) -> None:
        self.layers = layers
        self.dropped = dropped
        self._input: Tensor | None = None  # what the outputs in `_ready` are for
        self._received: Tensor | None = None  # by the owner that is being called
        self._ready: dict[int, Any] = {}  # the output, or `_Draws`, by the id of its layer
        self._ends = list(accumulate(layer.out_features for layer in layers))

    def __getstate__(self) -> dict[str, Any]:
        """A copy has none of the pass's tensors."""
        return {**self.__dict__, "_input": None, "_received": None, "_ready": {}}

    def watch(self, owner: nn.Module) -> None:
        """Notes what a LoRA layer receives, for the time of its call."""
        owner.register_forward_pre_hook(self._note_received)
        owner.register_forward_hook(self._forget_received)

    def _note_received(self, owner: nn.Module, args: tuple[Any, ...]) -> None:
        self._received = args[0] if args else None

    def _forget_received(self, *_: object) -> None:
        self._received = None

    @property
    def rank(self) -> int:
        """The sum of the layers' ranks."""
        return self._ends[-1]

    def ranks(self, place: int) -> slice:
        """Which of all ranks belong to the layer at a place in `layers`."""
        return slice(self._ends[place] - self.layers[place].out_features, self._ends[place])

    def output(self, layer: nn.Module, input: Tensor) -> Tensor | None:
        """The layer's output (rows, …, r); None where it is to be computed alone."""
        shared = self._shared(input)
        if shared is not self._input:
            self._ready = {}
        part = self._ready.pop(id(layer), None)
        if part is None and self._may_compute(layer):
            parts = self._parts(shared)
            self._ready = {id(each): part for each, part in zip(self.layers, parts, strict=True)}
            part = self._ready.pop(id(layer))
        self._input = shared if self._ready else None
        return part.output(input) if isinstance(part, _Draws) else part

    def _shared(self, input: Tensor) -> Tensor:
        """The tensor that a layer's input is, or is a copy of: dropped out, or of another type."""
        received = self._received
        if received is None or received.shape != input.shape:
            return input
        is_copy = self.dropped or received.dtype is not input.dtype
        return received if is_copy else input

    def _parts(self, shared: Tensor) -> list[Any]:
        """The outputs of all layers, or their draws where each has an input of its own."""
        first = self.layers[0]
        mean = torch.cat([layer.weight for layer in self.layers])
        root_std = torch.cat([layer.root_std for layer in self.layers])
        ranks = [layer.out_features for layer in self.layers]
        if not self.dropped:
            return list(first.noisy(shared, mean, root_std, slice(None)).split(ranks, -1))
        call, noise = first.row_noise(shared, slice(None))
        draws: Any = RowDraws.apply(mean, root_std, noise, compute_dtype(first.weight))
        return [_Draws(weights, call) for weights in draws.split(ranks, 1)]

    def _may_compute(self, layer: nn.Module) -> bool:
        """Whether it is no replica, and no layer is at its mean or spread over devices."""
        for each in self.layers:
            is_whole = type(each.weight) is nn.Parameter and not is_partitioned(each.weight)
            if not (each.training and is_whole):
                return False
        return any(each is layer for each in self.layers)


def fuse_inputs(slots: Slots, layers: Mapping[str, Any]) -> None:
    """Fuses the Gaussian layers, by slot name, that a block gives one tensor."""
    groups: dict[Any, dict[str, Any]] = {}  # layers by path, of those that receive one tensor
    for name, layer in layers.items():
        path, side = split_name(name)
        block, _, leaf = path.rpartition(".")
        family = next((names for names in _ONE_INPUT if leaf in names), None)
        if side == "lora_A" and family:
            owner: Any = slots.layers[path]
            dropped = not isinstance(owner.lora_dropout[slots.adapter], nn.Identity)
            alike = (layer.in_features, layer.weight.dtype, layer.weight.device)
            groups.setdefault((dropped, block, family, *alike), {})[path] = layer
    for (dropped, *_), group in groups.items():
        fused = FusedInput(list(group.values()), dropped=dropped) if len(group) > 1 else None
        for place, (path, layer) in enumerate(group.items()):
            layer.fused = fused
            layer.ranks = fused.ranks(place) if fused else slice(None)
            if fused:
                fused.watch(slots.layers[path])
