"""Models inside wrappers: compiled, or made parallel; what is inside is the one that predicts."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

# parts that wrappers add to a module's path: torch.compile's, checkpointing's, FSDP's
_ADDED = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")


class _Stance:
    """torch.compile's stance, one of the process: plain code while any pass asks for it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.passes = 0
        self.forced: list[Any] = []

    def enter(self) -> None:
        with self.lock:
            if self.passes == 0:
                self.forced = [torch.compiler.set_stance("force_eager")]
                self.forced[0].__enter__()
            self.passes += 1

    def leave(self) -> None:
        with self.lock:
            self.passes -= 1
            if self.passes == 0:
                self.forced.pop().__exit__(None, None, None)


_STANCE = _Stance()


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`'s and data-parallel wrappers, or the model itself."""
    while True:
        modules = vars(model).get("_modules", {})
        if "_orig_mod" in modules:
            model = modules["_orig_mod"]
        elif isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        else:
            return model


def plain_path(path: str) -> str:
    """A module's path without what wrappers add to it.

    Example:
        >>> plain_path("base_model.model._orig_mod.layers.0")
        'base_model.model.layers.0'
    """
    for added in _ADDED:
        path = path.replace(added, "")
    return path


def runs_compiled(module: nn.Module) -> bool:
    """Whether a module itself is compiled, whatever its parts are."""
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def is_compiled(model: nn.Module) -> bool:
    """Whether the model or a part of it runs through `torch.compile`."""
    return any(runs_compiled(module) for module in model.modules())


@contextmanager
def eagerly(compiled: bool) -> Iterator[None]:
    """Runs compiled models as plain code for the time of the context.

    Draws put new modules in a model's slots for each pass, for which it would be compiled anew.

    Args:
        compiled: whether anything runs through `torch.compile`; if not, nothing is changed.
    """
    if not compiled:
        yield
        return
    _STANCE.enter()
    try:
        yield
    finally:
        _STANCE.leave()
