"""Says once that Gaussian layers are trained without a KL step."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)

_PASSES = 20


class Unattended:
    """A forward pre-hook of a model: counts training passes in which no KL step acts on its layers.

    Args:
        layers: `GaussianLinear`, whose `takes_kl` a KL step sets.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = list(layers)
        self.passes = 0

    def __call__(self, model: nn.Module, _: Any) -> None:
        """Warns in the twentieth such pass, if the standard deviation is still as at its start."""
        if torch.compiler.is_compiling() or self.passes >= _PASSES:
            return
        if not model.training or not torch.is_grad_enabled():
            return
        self.passes += 1
        if self.passes < _PASSES or any(layer.takes_kl for layer in self.layers):
            return
        first = self.layers[0]
        root_std = first.root_std.detach()
        here = root_std.to_local() if hasattr(root_std, "to_local") else root_std
        std = float(here.float().square().mean()) if here.numel() else 0.0
        if first.root_std.requires_grad and std < 2 * first.init_root_std**2:
            logger.warning(
                "%d training passes without a KL step: the standard deviation stays near its start "
                "(%.2g), so this trains a point; give the Trainer callbacks=[KLStep()], or call "
                "KLStep().attach(model, optimizer, total_steps=…) in a loop of your own",
                _PASSES,
                std,
            )
