"""Which attention function trains fastest: on a CPU in bfloat16 it is not the default one."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from bayestune.adapters import base_of

SHORT = 192  # tokens, about where both take as long (studies/choices.py)


def trains_faster_eagerly(model: nn.Module, longest: float, *, bf16: bool) -> bool:
    """Whether the model runs torch's fused attention on a CPU, in bfloat16, over short rows.

    There the backward pass takes longer than that of products and softmax. `longest` counts tokens
    of a row; `bf16` says whether autocast is on.
    """
    weight = next(model.parameters())
    narrow = bf16 or weight.dtype is torch.bfloat16
    fused = base_of(model).config._attn_implementation == "sdpa"
    return weight.device.type == "cpu" and narrow and longest <= SHORT and fused


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
