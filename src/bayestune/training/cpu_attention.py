"""Which attention function trains fastest: on a CPU in bfloat16 it is not the default one."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from bayestune.adapters import base_of

SHORT = 192  # tokens, about where both take as long (studies/choices.py)


def trains_faster_eagerly(model: nn.Module, longest: float, *, bf16: bool) -> bool:
    """Whether the model runs torch's fused attention on a CPU, in bfloat16, over short rows.

    There the fused function's backward pass takes longer than the products and the softmax do.

    Args:
        model: a transformers model, with or without adapters.
        longest: tokens of the longest row.
        bf16: whether it is trained under bfloat16 autocast.
    """
    weight = next(model.parameters())
    narrow = bf16 or weight.dtype is torch.bfloat16
    fused = base_of(model).config._attn_implementation == "sdpa"
    return weight.device.type == "cpu" and narrow and longest <= SHORT and fused


@contextmanager
def eager_attention(model: nn.Module, active: bool = True) -> Iterator[None]:
    """For the time of the context, attention as products and softmax; equal up to rounding.

    Args:
        model: a transformers model, with or without adapters.
        active: False to leave it as it is.
    """
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
