"""The precision of a base's weights, quantised ones among them."""

from typing import Any

import torch
from torch import nn

from bayestune.adapters.locks import base_of
from bayestune.adapters.lora import input_embedding, output_head

# bitsandbytes' layers by name, so that the package need not be there
_BITS = {"Linear4bit": "4bit", "Linear8bitLt": "8bit"}


def precision_of(model: nn.Module) -> str:
    """The precision of a base's weights: "float32", "bfloat16", "4bit", "8bit", "torchao", ….

    A base that another package than bitsandbytes quantised has that method's name in transformers.
    """
    base = base_of(model)
    for module in base.modules():
        if type(module).__name__ in _BITS:
            return _BITS[type(module).__name__]
    return quant_method_of(base) or str(_main_dtype(base)).removeprefix("torch.")


def quant_method_of(model: nn.Module) -> str | None:
    """The quantisation method that a model's configuration names, such as "gptq"; None if none."""
    config: Any = getattr(model, "config", None)
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    return str(getattr(method, "value", method))


def num_quantised(model: nn.Module) -> tuple[int, int]:
    """How many weights are in bitsandbytes' layers, and how many are elsewhere.

    Those of embeddings and of the output head, which are never quantised, do not count.
    """
    inside: dict[int, int] = {}
    for module in model.modules():
        if type(module).__name__ in _BITS and not hasattr(module, "base_layer"):
            layer: Any = module
            inside[id(layer.weight)] = layer.in_features * layer.out_features
    not_counted = set(inside)
    for module in (input_embedding(model), output_head(model)):
        if module is not None:
            not_counted.update(map(id, module.parameters()))
    elsewhere = sum(p.numel() for p in model.parameters() if id(p) not in not_counted)
    return sum(inside.values()), elsewhere


def _main_dtype(base: nn.Module) -> torch.dtype:
    """The type of the first weights that are not an adapter's."""
    for name, parameter in base.named_parameters():
        if parameter.is_floating_point() and ".lora_" not in name:
            return parameter.dtype
    return torch.float32
