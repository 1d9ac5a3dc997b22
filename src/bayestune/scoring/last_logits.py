"""A language model's logits at its last positions, without computing the others."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from bayestune.adapters import base_of


def last_logits(model: nn.Module, inputs: Mapping[str, Any], keep: int) -> Tensor:
    """The logits (N, keep, V) of the last `keep` positions, and no others where the model can.

    Args:
        model: a language model, with or without adapters.
        inputs: holds `input_ids` (N, T), `attention_mask` and `position_ids`.
        keep: the number of positions.
    """
    inner: Any = base_of(
        getattr(model, "module", model)
    )  # without the wrapper of parallel training
    accepted = inspect.signature(inner.forward).parameters
    options = {"position_ids": inputs["position_ids"], "logits_to_keep": keep, "use_cache": False}
    with _contiguous_input(inner.get_output_embeddings()):
        output = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            **{name: value for name, value in options.items() if name in accepted},
        )
    return output.logits[:, -keep:]


@contextmanager
def _contiguous_input(head: nn.Module | None) -> Iterator[None]:
    """Copies the positions that reach the head: for a slice, torch's CPU product copies the weight."""
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()
