"""A Gaussian over A in LoRA's slot: the layer, and `bayesify`, which puts it there."""

import logging
import math
from collections.abc import Collection
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayestune.adapters.copies import let_copies_take_the_mean
from bayestune.adapters.drawn_linear import compute_dtype
from bayestune.adapters.entrances import passes_of, put_row_axes
from bayestune.adapters.fused_input import FusedInput, RowNoise, RowProduct, fuse_inputs
from bayestune.adapters.noise import FlipoutNoise, independent_noise, random_signs
from bayestune.adapters.one_pass import Call
from bayestune.adapters.own_saving import keep_standard_deviations
from bayestune.adapters.slots import Slots
from bayestune.adapters.spread import put_whole
from bayestune.adapters.training_passes import TrainingPasses
from bayestune.adapters.unattended import Unattended
from bayestune.errors import Refusal

logger = logging.getLogger(__name__)

Noise = Literal["row", "independent", "token"]


class GaussianLinear(nn.Linear):
    """A linear map whose weight is A ~ N(M, Ω²), Ω = G∘G: M is `weight`, G is `root_std`, (r, k).

    In training mode each row of a pass of the model sees one draw, however often the layer is
    called; in evaluation mode the map is the mean's.

    Args:
        linear: the plain layer whose weight becomes the mean (the same Parameter, not a copy).
        init_root_std: ε; G starts uniform on (ε/√2, ε), so σ starts in (ε²/2, ε²).
        noise: "row", flipout signs per row; "independent", a fresh E per row; "token", flipout
            signs per token, new in every call, as in the authors' code. All three have the same
            marginal variance; only "token" works on activations.
        passes: shared by a model's layers, see `TrainingPasses`.

    Raises:
        Refusal: if `noise` is unknown or `init_root_std` is not positive.

    Reference:
        Wang, Shi, Han, Metaxas, Wang: BLoB, NeurIPS 2024, https://arxiv.org/abs/2406.11675.
    """

    root_std: nn.Parameter
    takes_kl: bool = False  # a KL step has been attached
    noiseless: bool = False  # σ was set to 0 on purpose

    def __init__(
        self,
        linear: nn.Linear,
        init_root_std: float = 0.05,
        noise: Noise = "row",
        passes: TrainingPasses | None = None,
    ) -> None:
        if noise not in get_args(Noise):
            raise Refusal(
                f'unknown noise: got {noise!r}, expected one of {get_args(Noise)}; "row" is usual'
            )
        if init_root_std <= 0:
            raise Refusal(f"init_root_std must be positive: got {init_root_std}; 0.05 is usual")
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight
        start = torch.empty_like(self.weight)
        start.uniform_(init_root_std / math.sqrt(2), init_root_std)
        self.root_std = nn.Parameter(start, requires_grad=self.weight.requires_grad)
        self.init_root_std = init_root_std
        self.noise: Noise = noise
        self.passes = passes if passes is not None else TrainingPasses()
        self.row_axis: int | None = 0
        self.fused: FusedInput | None = None
        self.ranks = slice(None)  # which of the fused layers' ranks are its own
        self.train(linear.training)

    @torch.no_grad()
    def set_root_std(self, root_std: Tensor) -> None:
        """Sets G (r, k), which may be 0 everywhere: then the layer is a point."""
        put_whole(self.root_std, root_std)
        self.noiseless = not bool(root_std.any())

    @property
    def std(self) -> Tensor:
        """Ω = G∘G (r, k), differentiable."""
        return self.root_std.square()

    def forward(self, input: Tensor) -> Tensor:
        """Maps (rows, …, k) to (rows, …, r)."""
        if not self.training or self.passes.are_at_mean():
            return F.linear(input, self.weight)
        if self.noise == "token":
            return self._token_forward(input)
        if self.noise == "independent":
            return self._independent_forward(input)
        output = self.fused.output(self, input) if self.fused else None
        if output is None:
            output = self.noisy(input, self.weight, self.root_std, self.ranks)
        return output

    def noisy(self, input: Tensor, mean: Tensor, root_std: Tensor, ranks: slice) -> Tensor:
        """Maps (rows, …, k) to (rows, …, r), each row under its own draw.

        Args:
            input: (rows, …, k).
            mean: M (r, k), of this layer, or of all that are computed with it as one.
            root_std: G (r, k), likewise.
            ranks: which ranks of the drawn noise these r are.
        """
        call, noise = self.row_noise(input, ranks)
        blocks = call.blocks.to(compute_dtype(self.weight))
        return call.shaped(RowNoise.apply(blocks, mean, root_std, noise))  # type: ignore[arg-type]

    def row_noise(self, input: Tensor, ranks: slice) -> tuple[Call, FlipoutNoise]:
        """The input (rows, …, k) in blocks, and the noise of some ranks that each block sees."""
        rank = self.fused.rank if self.fused else self.out_features
        draw = partial(FlipoutNoise.drawn, rank=rank, like=self.weight.detach())
        call = self.passes.call(self.fused or self, input, self.row_axis, draw)
        noise = call.noise.of_ranks(ranks)
        return call, noise if call.which is None else noise.of_rows(call.which)

    def _independent_forward(self, input: Tensor) -> Tensor:
        draw = partial(independent_noise, like=self.weight)
        call = self.passes.call(self, input, self.row_axis, draw)
        weights = torch.addcmul(self.weight, self.std, call.of_blocks(call.noise))
        blocks = call.blocks.to(compute_dtype(self.weight))
        return call.shaped(RowProduct.apply(blocks, weights.to(blocks.dtype)))  # type: ignore[arg-type]

    def _token_forward(self, input: Tensor) -> Tensor:
        sign_in = random_signs(*input.shape, like=input)
        sign_out = random_signs(*input.shape[:-1], self.out_features, like=input)
        noise = F.linear(input * sign_in, self.std * torch.randn_like(self.weight))
        return F.linear(input, self.weight) + noise * sign_out

    def extra_repr(self) -> str:
        """The line that `print(model)` shows."""
        return f"{super().extra_repr()}, noise={self.noise}"


def bayesify(
    model: nn.Module,
    *,
    init_root_std: float = 0.05,
    noise: Noise = "row",
    adapter: str | None = None,
    slots: Collection[str] | None = None,
) -> int:
    """Makes A of every LoRA layer Gaussian, in place: q(A) = N(M, Ω²), with M the present A.

    Afterwards training mode, with gradients or without, draws one A for each row of a pass.
    Evaluation mode uses the mean; so do `generate` in either mode, and passes without gradients
    while a Trainer runs with `KLStep`. Sequences that make one row, such as the two sides of a
    preference, share their draw if `group_rows` says so; each document of a packed batch, which
    positions tell apart, is a row. An input that all rows share, such as relative positions, sees
    the first row's draw. All layers are checked before any is converted.

    The model's own `save_pretrained`, which a Trainer and `push_to_hub` call, then writes the
    posterior's files beside the stock adapter, for `load_posterior`. G starts anew even on an
    adapter that has been trained, with a warning: `load_posterior` restores a saved one.

    Args:
        model: the model that `peft.get_peft_model` returned.
        init_root_std: ε; G = √Ω starts uniform on (ε/√2, ε).
        noise: "row", "independent" or "token", see `GaussianLinear`.
        adapter: which adapter of the model; None for the active one.
        slots: which slots, as `Slots.names` gives them; None for A of every layer.

    Returns:
        How many slots were converted.

    Raises:
        Refusal: if the model has no layer with this adapter, or one of them cannot be made
            stochastic (DoRA and other variants, embeddings, `target_parameters`, a slot that holds
            no plain Linear, a second conversion); each is named with its reason. Or if the
            adapter's initialisation changed the base's weights, so that it could not be saved.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> base = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
        >>> bayesify(get_peft_model(base, LoraConfig(target_modules=["0", "1"])))
        2
    """
    of_adapter = Slots(model, adapter)
    count = make_gaussian(of_adapter, slots, init_root_std=init_root_std, noise=noise)
    weights = of_adapter.weights()
    if any(bool(weights[name].any()) for name in of_adapter.names(("lora_B",))):
        logger.warning(
            "B of the adapter %r is not 0, as after training, and the standard deviation of its A "
            "starts anew, at %.2g at most; a saved posterior comes back with its own by "
            "load_posterior(base, folder)",
            of_adapter.adapter,
            init_root_std**2,
        )
    return count


def make_gaussian(
    slots: Slots,
    names: Collection[str] | None = None,
    *,
    init_root_std: float = 0.05,
    noise: Noise = "row",
) -> int:
    """What `bayesify` does, without its warning about a trained adapter.

    Args:
        slots: of the adapter.
        names: which of them become Gaussian; None for A of every layer.
        init_root_std: ε, as in `bayesify`.
        noise: as in `bayesify`.

    Returns:
        How many slots were converted.
    """
    plain = slots.replaceable(names)
    keep_standard_deviations(slots.model, slots.adapter)
    let_copies_take_the_mean(slots.model)
    passes = passes_of(slots.model)
    gaussian = {
        name: GaussianLinear(slot, init_root_std, noise, passes) for name, slot in plain.items()
    }
    put_row_axes(slots.model, gaussian)
    slots.put(gaussian)
    if noise == "row":
        fuse_inputs(slots, gaussian)
    slots.model.register_forward_pre_hook(Unattended(list(gaussian.values())))
    return len(gaussian)
