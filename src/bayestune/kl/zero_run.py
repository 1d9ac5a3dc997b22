"""KL steps under DeepSpeed's ZeRO, whose optimiser steps on flat float32 parts of parameters."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bayestune.kl.closed_form import kl_step_
from bayestune.kl.run import KLRun
from bayestune.kl.surroundings import refuse_unreached, with_trained_std
from bayestune.kl.zero_optimizer import Piece, piece_of


class ZeroRun(KLRun):
    """A `KLRun` that moves each process's pieces of M and G, inside ZeRO's step, before it gathers.

    A KL step moves every entry independently of the others, so nothing is sent between processes.
    Where this run moves G along the likelihood, what the inner optimiser did to G is undone.
    """

    def hook(self, optimizer: Any) -> None:
        """Puts hooks on the inner optimiser, which ZeRO calls once for each group, and on ZeRO."""
        self._optimizer = optimizer
        self._before: list[tuple[Piece, Tensor, Tensor | None]] = []  # of G: value and gradient
        self._with_gradient: set[str] = set()  # names of parameters
        inner: torch.optim.Optimizer = optimizer.optimizer
        self._handles = [
            inner.register_step_pre_hook(lambda *_: self._before_group()),
            inner.register_step_post_hook(lambda *_: self._after_group()),
        ]
        for name, layer in self.layers.items():
            layer.takes_kl = True
            for part in ("weight", "root_std"):
                self._watch(layer.get_parameter(part), f"{name}.{part}")
        original_step = optimizer.step

        def step(*args: Any, **options: Any) -> Any:
            self._check_gradients()
            original_step(*args, **options)
            if not getattr(optimizer, "overflow", False):
                self.count_step()

        optimizer.step = step

    def _watch(self, parameter: nn.Parameter, name: str) -> None:
        """Notes when a parameter has got a gradient: ZeRO may have taken it away by its step."""
        if parameter.requires_grad:
            handle = parameter.register_post_accumulate_grad_hook(
                lambda _: self._with_gradient.add(name)
            )
            self._handles.append(handle)

    def unhook(self) -> None:
        """Takes the hooks off."""
        super().unhook()
        vars(self._optimizer).pop("step", None)

    def _check_gradients(self) -> None:
        """Refuses the first gradients if the noise of a layer was not in the pass."""
        trained = with_trained_std(self.layers)
        unreached = [name for name in trained if f"{name}.root_std" not in self._with_gradient]
        if self._unreached is None:
            bypassed = [name for name in unreached if f"{name}.weight" in self._with_gradient]
            refuse_unreached(trained, unreached, bypassed)
        self._unreached = unreached
        self.say_at_mean()

    def _pieces(self, part: str) -> Iterator[Piece]:
        """The pieces of M or G that the inner optimiser holds in this call."""
        for layer in self.layers.values():
            parameter = layer.get_parameter(part)
            if parameter.requires_grad and (piece := piece_of(parameter, self._optimizer)):
                yield piece

    def _before_group(self) -> None:
        """Keeps G and its gradient, if this run moves G, for `_after_group`."""
        self._before = []
        if not self.moves_root_std:
            return
        for piece in self._pieces("root_std"):
            gradient = piece.gradient
            gradient = None if gradient is None else gradient.clone()
            self._before.append((piece, piece.value.clone(), gradient))

    @torch.no_grad()
    def _after_group(self) -> None:
        """Takes the KL step, and G's on the likelihood, on the pieces of this group."""
        for piece, value, _ in self._before:
            piece.value.copy_(value)
        sizes, std_rate = self.planned()
        means = [piece.value for piece in self._pieces("weight")]
        roots = [piece.value for piece in self._pieces("root_std")]
        for size in sizes:
            kl_step_(means, roots, size, self.prior_std)
        for piece, _, gradient in self._before:
            if sizes and gradient is not None:
                piece.value.add_(gradient.to(piece.flat.dtype), alpha=-std_rate)
        self._before = []
