"""A language model's logits at its last positions, without computing the others."""

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from bayestune.adapters import base_of


def last_logits(model: nn.Module, inputs: Mapping[str, Any], keep: int) -> Tensor:
    """The logits (N, keep, V) of the last `keep` positions, without the others if the model can."""
    unwrapped = getattr(model, "module", model)  # parallel training wraps the model
    inner: Any = base_of(unwrapped)
    accepted = inspect.signature(inner.forward).parameters
    options = {"position_ids": inputs["position_ids"], "logits_to_keep": keep, "use_cache": False}
    arguments = {name: value for name, value in options.items() if name in accepted}
    arguments |= {name: inputs[name] for name in ("input_ids", "attention_mask")}
    head = inner.get_output_embeddings()
    with nullcontext() if head is None else head.register_forward_pre_hook(_contiguous):
        return model(**arguments).logits[:, -keep:]


def _contiguous(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    # given a slice of all positions, torch's product on the CPU would copy the head's whole weight
    return (inputs[0].contiguous(), *inputs[1:])
