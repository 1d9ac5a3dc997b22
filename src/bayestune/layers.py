"""Modules that stand in LoRA's `lora_A` slot: a Gaussian over A, and a stack of fixed draws of A."""

import math
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayestune.gaussian import independent_weights, random_signs

Noise = Literal["row", "independent", "token"]


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
        half = root_std * torch.randn_like(mean)  # G∘E: half of ∂(G∘G∘E)/∂G
        weights = torch.addcmul(mean, _outer(signs, len(mean)), root_std * half).to(input.dtype)
        ctx.save_for_backward(input, weights, signs, half)
        return torch.bmm(input, weights.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        (gradient,), (input, weights, signs, half) = gradients, ctx.saved_tensors
        of_input = torch.bmm(gradient, weights) if ctx.needs_input_grad[0] else None
        of_draws = torch.bmm(gradient.transpose(1, 2), input).to(half.dtype)
        of_mean = of_draws.sum(0)
        return of_input, of_mean, of_draws.mul_(_outer(signs, len(half))).sum(0).mul_(half).mul_(2)


def _outer(signs: Tensor, rank: int) -> Tensor:
    """s_n t_nᵀ (N, r, k) of the signs (N, r + k)."""
    return signs[:, :rank, None] * signs[:, None, rank:]


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
        dtype, num_rows = compute_dtype(self.weight), self.groups.rows(input.shape[0])
        rows = input.reshape(num_rows, -1, self.in_features).to(dtype)
        if self.noise == "row":
            output = _RowNoise.apply(rows, self.weight, self.root_std)
        else:
            weights = independent_weights(self.weight, self.std, num_rows)
            output = _RowProduct.apply(rows, weights.to(dtype))
        return output.view(*input.shape[:-1], self.out_features)  # type: ignore[union-attr]

    def _token_forward(self, input: Tensor) -> Tensor:
        sign_in = random_signs(*input.shape, like=input)
        sign_out = random_signs(*input.shape[:-1], self.out_features, like=input)
        noise = F.linear(input * sign_in, self.std * torch.randn_like(self.weight))
        return F.linear(input, self.weight) + noise * sign_out

    def extra_repr(self) -> str:
        """The line that `print(model)` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, noise={self.noise}"


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
