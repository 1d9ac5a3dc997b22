"""Whether adapters of one model differ only in A and B, so that their draws share slots."""

from collections.abc import Sequence
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper

from bayestune.adapters.slots import Slots


def are_alike(adapters: Sequence[Slots]) -> bool:
    """Whether A and B of each adapter act in the first one's slots as they do in their own.

    They do if the layers, the ranks and the scalings are the same, and no adapter has a bias, a
    variant such as DoRA, or something that is trained beside LoRA.
    """
    first = adapters[0]
    expected = (first.shapes(), _scalings(first))
    for slots in adapters:
        if (slots.shapes(), _scalings(slots)) != expected or _has_more(slots):
            return False
    return True


def _scalings(slots: Slots) -> dict[str, Any]:
    return {path: layer.scaling[slots.adapter] for path, layer in slots.layers.items()}


def _has_more(slots: Slots) -> bool:
    """Whether an adapter's function is not that of A, B and the scalings alone."""
    for module in slots.model.modules():
        wraps = isinstance(module, AuxiliaryTrainingWrapper)
        if wraps and slots.adapter in module._get_available_adapters():
            return True
    variants = [getattr(layer, "lora_variant", {}) for layer in slots.layers.values()]
    if any(slots.adapter in variant for variant in variants):
        return True
    return any(getattr(module, "bias", None) is not None for module in slots.modules().values())
