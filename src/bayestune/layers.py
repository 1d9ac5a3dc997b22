"""Modules that stand in LoRA's `lora_A` slot: a Gaussian over A, and a stack of fixed draws of A."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayestune.gaussian import independent_weights, random_signs

Noise = Literal["row", "independent", "token"]
# Names of modules that attention and gated MLPs give one tensor, in Llama and most others, BERT and DistilBERT.
_ONE_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
)


@dataclass
class RowGroups:
    """How many sequences of the batch make one row; shared by all Gaussian layers of a model.

    A question whose options are scored as separate sequences is one row: all of them must see the same draw.
    """

    size: int = 1

    def rows(self, sequences: int) -> int:
        """How many rows a batch of so many sequences has.

        Raises:
            ValueError: if the sequences do not divide into rows.
        """
        count, rest = divmod(sequences, self.size)
        if rest:
            raise ValueError(
                f"the batch does not divide into rows: got {sequences} sequences, expected a multiple of "
                f"{self.size} (sequences a row); use group_rows(model, 1) for a plain batch"
            )
        return count


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The type a product with this weight is computed in: autocast's where it is on, else the weight's."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


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

    def __init__(self, layers: Sequence["GaussianLinear"]) -> None:
        self.layers = list(layers)
        self._input: Tensor | None = None
        self._ready: dict[int, Tensor] = {}

    def output(self, layer: "GaussianLinear", input: Tensor) -> Tensor | None:
        """The layer's output (rows, …, r); None where it is to be computed alone."""
        first, *others = self.layers
        whole = all(one.training and type(one.weight) is nn.Parameter for one in self.layers)
        if layer is first and whole:  # else one is held at its mean, or weights are spread over devices
            output, *rest = self._outputs(input)
            self._input, self._ready = input, {id(one): part for one, part in zip(others, rest, strict=True)}
            return output
        if input is not self._input:
            self._ready = {}
        output = self._ready.pop(id(layer), None)  # a replica of a layer finds nothing
        self._input = self._input if self._ready else None
        return output

    def _outputs(self, input: Tensor) -> Sequence[Tensor]:
        mean = torch.cat([one.weight for one in self.layers])
        root_std = torch.cat([one.root_std for one in self.layers])
        return self.layers[0].noisy(input, mean, root_std).split([one.out_features for one in self.layers], -1)


class GaussianLinear(nn.Linear):
    """A linear map whose weight is A ~ N(M, Ω²), Ω = G∘G: M is `weight`, G is `root_std`, both (r, k).

    In training mode each row of the batch sees one coherent draw; in evaluation mode the map is the mean's.

    Args:
        linear: the plain layer whose weight becomes the mean (the same Parameter, not a copy).
        init_root_std: ε; G starts uniform on (ε/√2, ε), so σ starts in (ε²/2, ε²).
        noise: "row", flipout signs per row; "independent", a fresh E per row; "token", flipout signs per token, as
            in the authors' code. All three have the same marginal variance; only "token" works on activations.
        groups: shared by a model's layers, see `RowGroups`.

    Raises:
        ValueError: if `noise` is unknown or `init_root_std` is not positive.

    Example:
        >>> layer = GaussianLinear(nn.Linear(16, 4, bias=False)).eval()
        >>> layer(torch.ones(2, 3, 16)).shape
        torch.Size([2, 3, 4])

    Reference:
        Wang, Shi, Han, Metaxas, Wang: BLoB, NeurIPS 2024, https://arxiv.org/abs/2406.11675.
    """

    root_std: nn.Parameter

    def __init__(
        self,
        linear: nn.Linear,
        init_root_std: float = 0.05,
        noise: Noise = "row",
        groups: RowGroups | None = None,
    ) -> None:
        if noise not in get_args(Noise):
            raise ValueError(f"unknown noise: got {noise!r}, expected one of {get_args(Noise)}")
        if init_root_std <= 0:
            raise ValueError(f"init_root_std must be positive: got {init_root_std}; the paper uses 0.05")
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        self.root_std = nn.Parameter(
            torch.empty_like(linear.weight).uniform_(init_root_std / math.sqrt(2), init_root_std),
            requires_grad=linear.weight.requires_grad,
        )
        self.init_root_std = init_root_std
        self.noise: Noise = noise
        self.groups = groups if groups is not None else RowGroups()
        self.shared: SharedInput | None = None
        self.train(linear.training)

    @property
    def std(self) -> Tensor:
        """Ω = G∘G (r, k), differentiable."""
        return self.root_std.square()

    def forward(self, input: Tensor) -> Tensor:
        """Maps (rows, …, k) to (rows, …, r)."""
        if not self.training:
            return F.linear(input, self.weight)
        if self.noise == "token":
            return self._token_forward(input)
        if self.noise == "row":
            output = self.shared.output(self, input) if self.shared else None
            return self.noisy(input, self.weight, self.root_std) if output is None else output
        rows = self._rows(input)
        weights = independent_weights(self.weight, self.std, len(rows))
        output = _RowProduct.apply(rows, weights.to(rows.dtype))
        return output.view(*input.shape[:-1], self.out_features)  # type: ignore[union-attr]

    def noisy(self, input: Tensor, mean: Tensor, root_std: Tensor) -> Tensor:
        """Maps (rows, …, k) to (rows, …, r), each row under its own draw of N(mean, (root_std∘root_std)²), (r, k)."""
        output = _RowNoise.apply(self._rows(input), mean, root_std)
        return output.view(*input.shape[:-1], len(mean))  # type: ignore[union-attr]

    def _rows(self, input: Tensor) -> Tensor:
        """The input as (N, tokens of a row, k), in the type that the product is computed in."""
        rows = input.reshape(self.groups.rows(input.shape[0]), -1, self.in_features)
        return rows.to(compute_dtype(self.weight))

    def _token_forward(self, input: Tensor) -> Tensor:
        sign_in = random_signs(*input.shape, like=input)
        sign_out = random_signs(*input.shape[:-1], self.out_features, like=input)
        noise = F.linear(input * sign_in, self.std * torch.randn_like(self.weight))
        return F.linear(input, self.weight) + noise * sign_out

    def extra_repr(self) -> str:
        """The line that `print(model)` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, noise={self.noise}"


def share_inputs(
    layers: Mapping[str, GaussianLinear], owners: Mapping[str, Any], adapter: str
) -> Mapping[str, GaussianLinear]:
    """Has layers that a block gives one tensor, by their names (path.lora_A), computed as one, see `SharedInput`.

    PEFT's layers at these paths, `owners`, say whether a slot gets its layer's input as it is: with dropout, or a base
    weight of another type than the adapter's, each slot is given a copy of its own.
    """
    together: dict[object, list[GaussianLinear]] = {}
    for name, layer in layers.items():
        block, _, leaf = name.removesuffix(".lora_A").rpartition(".")
        family = next((names for names in _ONE_INPUT if leaf in names), None)
        if family and layer.noise == "row" and _given_as_it_is(owners[f"{block}.{leaf}"], layer, adapter):
            key = block, family, layer.in_features, layer.weight.dtype, layer.weight.device
            together.setdefault(key, []).append(layer)
    for group in together.values():
        if len(group) > 1:
            shared = SharedInput(group)
            for layer in group:
                layer.shared = shared
    return layers


def _given_as_it_is(owner: Any, slot: GaussianLinear, adapter: str) -> bool:
    base = getattr(owner.get_base_layer(), "weight", None)
    return base is not None and base.dtype is slot.weight.dtype and isinstance(owner.lora_dropout[adapter], nn.Identity)


class DrawnLinear(nn.Module):
    """S fixed weights applied to S·N rows in one batched product; the rows come draw by draw.

    Args:
        weights: the stack of draws (S, r, k).

    Example:
        >>> layer = DrawnLinear(torch.stack([torch.zeros(4, 16), torch.ones(4, 16)]))
        >>> layer(torch.ones(6, 3, 16))[:, 0, 0].tolist()
        [0.0, 0.0, 0.0, 16.0, 16.0, 16.0]
    """

    weight: Tensor

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weights, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """Maps (S·N, …, k) to (S·N, …, r).

        Raises:
            ValueError: if the leading axis is not a multiple of S.
        """
        draws, rank, width = self.weight.shape
        if input.shape[0] % draws:
            raise ValueError(
                f"the rows do not divide into draws: got {input.shape[0]} rows, expected a multiple of {draws}; "
                "repeat the batch once for each draw"
            )
        output = torch.bmm(input.reshape(draws, -1, width), self.weight.transpose(1, 2))
        return output.view(*input.shape[:-1], rank)

    @classmethod
    def of(cls, weights: Tensor, like: Tensor) -> Self:
        """The stack on the device of the weight it stands in for, in the type that its product is computed in.

        PEFT gives a slot its input in the type of the slot's weight: under autocast a float32 stack would have the
        activations copied to float32 and back.
        """
        return cls(weights.to(like.device, compute_dtype(like)))
