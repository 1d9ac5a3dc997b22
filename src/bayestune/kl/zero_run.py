"""KL steps under DeepSpeed's ZeRO, whose optimiser steps on flat float32 parts of parameters."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bayestune.kl.closed_form import kl_step_
from bayestune.kl.run import KLRun
from bayestune.kl.surroundings import refuse_unreached
from bayestune.kl.zero_optimizer import Piece, piece_of


class ZeroRun(KLRun):
    """A `KLRun` whose steps are taken on the pieces, inside ZeRO's step and before it gathers.

    A KL step moves every entry by itself, so each process moves its own and nothing is sent. What
    the inner optimiser did to G is undone where G follows the likelihood here.
    """

    def hook(self, optimizer: Any) -> None:
        """Puts hooks on the inner optimiser, which ZeRO calls once for each group, and on ZeRO."""
        self._optimizer = optimizer
        self._kept: list[tuple[Piece, Tensor, Tensor | None]] = []
        self._arrived: set[str] = set()
        inner: torch.optim.Optimizer = optimizer.optimizer
        self._handles = [
            inner.register_step_pre_hook(lambda *_: self._before_group()),
            inner.register_step_post_hook(lambda *_: self._after_group()),
        ]
        for name, layer in self.layers.items():
            layer.takes_kl = True
            for part in ("weight", "root_std"):
                self._watch(layer.get_parameter(part), f"{name}.{part}")
        taken = optimizer.step

        def step(*args: Any, **options: Any) -> Any:
            self.check_arrived()
            taken(*args, **options)
            if not getattr(optimizer, "overflow", False):
                self.count_step()

        optimizer.step = step

    def _watch(self, parameter: nn.Parameter, name: str) -> None:
        if parameter.requires_grad:
            arrive = parameter.register_post_accumulate_grad_hook(lambda _: self._arrived.add(name))
            self._handles.append(arrive)

    def unhook(self) -> None:
        """Takes the hooks off."""
        super().unhook()
        vars(self._optimizer).pop("step", None)

    def check_arrived(self) -> None:
        """Refuses the first gradients if the noise of a layer was not in the pass."""
        learnt = {name: one for name, one in self.layers.items() if one.root_std.requires_grad}
        missing = [name for name in learnt if f"{name}.root_std" not in self._arrived]
        if self._unreached is None:
            bypassed = [name for name in missing if f"{name}.weight" in self._arrived]
            refuse_unreached(learnt, missing, bypassed)
        self._unreached = missing
        self.say_at_mean()

    def _pieces(self, part: str) -> Iterator[Piece]:
        """The pieces of M or G that the inner optimiser holds in this call."""
        for layer in self.layers.values():
            parameter = layer.get_parameter(part)
            if parameter.requires_grad and (piece := piece_of(parameter, self._optimizer)):
                yield piece

    def _before_group(self) -> None:
        """Keeps G, and its gradient, from the inner optimiser."""
        self._kept = []
        for piece in self._pieces("root_std") if self.moves_root_std else ():
            gradient = piece.gradient
            kept = None if gradient is None else gradient.clone()
            self._kept.append((piece, piece.value.clone(), kept))

    @torch.no_grad()
    def _after_group(self) -> None:
        """Takes the KL step, and G's on the likelihood, on what the inner optimiser held."""
        for piece, value, _ in self._kept:
            piece.value.copy_(value)
        sizes, std_rate = self.planned()
        means = [piece.value for piece in self._pieces("weight")]
        roots = [piece.value for piece in self._pieces("root_std")]
        for size in sizes:
            kl_step_(means, roots, size, self.prior_std)
        for piece, _, gradient in self._kept if sizes else ():
            if gradient is not None:
                piece.value.add_(gradient.to(piece.flat.dtype), alpha=-std_rate)
        self._kept = []
