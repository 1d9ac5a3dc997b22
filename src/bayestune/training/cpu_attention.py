"""Which attention function trains fastest: on a CPU in bfloat16 it is not the default one."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from bayestune.adapters import base_of

SHORT = 192  # tokens, about where both take equally long (studies/choices.py)


def trains_faster_eagerly(model: nn.Module, longest: float, *, bf16: bool) -> bool:
    """Whether the model runs torch's fused attention on a CPU, in bfloat16, over short rows.

    There its backward pass takes longer than that of the products and the softmax.

    Args:
        model: to be trained.
        longest: tokens of the longest row.
        bf16: whether autocast to bfloat16 is on.
    """
    weight = next(model.parameters())
    in_bfloat16 = bf16 or weight.dtype is torch.bfloat16
    is_fused = base_of(model).config._attn_implementation == "sdpa"
    return weight.device.type == "cpu" and in_bfloat16 and longest <= SHORT and is_fused


@contextmanager
def eager_attention(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Attention as products and softmax inside the context, if `active`; equal up to rounding."""
    if not active:
        yield
        return
    base = base_of(model)
    before = base.config._attn_implementation
    base.set_attn_implementation("eager")
    try:
        yield
    finally:
        base.set_attn_implementation(before)
