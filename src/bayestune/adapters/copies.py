"""A copy of a Gaussian adapter under another name, as trainers keep for reference, is its mean."""

from typing import Any

import torch
from peft import PeftModel
from torch import nn

ROOT_STD = "root_std"


class MeanOfCopies:
    """Stands for `get_parameter` of a PEFT model that has Gaussian adapters.

    A trainer that needs the model as it was adds an adapter of the same settings and copies all
    parameters of the trained one by name. The new slots are plain layers, so they take the mean,
    and the standard deviations go to parameters that nobody uses: a reference has no noise.
    """

    def __init__(self, model: PeftModel) -> None:
        self.model = model

    def get_parameter(self, target: str) -> nn.Parameter:
        """`nn.Module.get_parameter`, or a parameter to be thrown away for a plain slot's G."""
        model: Any = self.model
        path, _, leaf = target.rpartition(".")
        if leaf == ROOT_STD:
            slot = model.get_submodule(path)
            if not hasattr(slot, ROOT_STD) and _beside_gaussian(model, path):
                return nn.Parameter(torch.empty_like(slot.weight), requires_grad=False)
        return type(model).get_parameter(model, target)


def _beside_gaussian(model: nn.Module, path: str) -> bool:
    """Whether another adapter's slot of the same layer is Gaussian."""
    slots = model.get_submodule(path.rpartition(".")[0])
    return any(hasattr(slot, ROOT_STD) for slot in slots.children())


def let_copies_take_the_mean(model: nn.Module) -> None:
    """Has a model be copied by the names of its parameters, adapter to adapter."""
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, PeftModel) and "get_parameter" not in vars(model):
        model.get_parameter = MeanOfCopies(model).get_parameter  # type: ignore[method-assign]
