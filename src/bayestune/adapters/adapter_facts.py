"""What `posterior.json` says of any adapter: its mean's digest, its base, what is beside it."""

import hashlib
from collections.abc import Mapping
from typing import Any

from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from bayestune.adapters.adapter_folder import is_resized, kept_beside, uncompiled
from bayestune.adapters.base_samples import DEPTH, base_samples, before_replication
from bayestune.adapters.locks import base_of
from bayestune.adapters.lora import input_embedding
from bayestune.adapters.slots import PREFIX, Slots
from bayestune.adapters.spread import part_here, shape_of


def facts_of(slots: Slots, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What `posterior.json` says of an adapter, whatever its posterior.

    Args:
        slots: of the adapter.
        state: the model's plain state.

    Returns:
        `mean_digest`, `base_samples` and, if there is such, `kept_beside` and `embedding_rows`.
    """
    beside = kept_beside(slots, state)
    facts: dict[str, Any] = {"mean_digest": mean_digest(slots, state)}
    facts["base_samples"] = _samples(slots, state, beside)
    if beside:
        facts["kept_beside"] = [uncompiled(name) for name in beside]
    num_rows = _num_embeddings(slots.model)
    if num_rows is not None and is_resized(slots.model):
        facts["embedding_rows"] = num_rows
    return facts


def facts_without_wrapper(slots: Slots, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """`facts_of` an adapter without PEFT's wrapper, whose folder holds nothing beside it."""
    return {"mean_digest": mean_digest(slots), "base_samples": _samples(slots, state, beside=[])}


def _num_embeddings(model: nn.Module) -> int | None:
    embedding: Any = input_embedding(model)
    return None if embedding is None else shape_of(embedding.weight)[0]


def mean_digest(slots: Slots, state: Mapping[str, Tensor] | None = None) -> str:
    """SHA-256 of A and B, so that no standard deviation is loaded around another mean.

    Args:
        slots: of the adapter.
        state: the model's plain state, to take A and B from; None for the slots themselves.
    """
    weights = slots.weights() if state is None else _weights_in(state, slots)
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(weight.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _weights_in(state: Mapping[str, Tensor], slots: Slots) -> dict[str, Tensor]:
    """A and B of the state by slot name: where a model is sharded, the state has them whole."""
    by_name = {uncompiled(name): value for name, value in state.items()}
    weights = {}
    for path in slots.modules():
        slot = uncompiled(path)
        weights[slot] = by_name[f"{PREFIX}{slot}.{slots.adapter}.weight"].detach()
    return weights


def _samples(slots: Slots, state: Mapping[str, Tensor], beside: list[str]) -> dict[str, Any]:
    """Samples of the base's own weights, without those that the adapter's folder holds."""
    model: Any = slots.model
    kept = {_address(state[name]) for name in beside}  # also under the name of a tied head
    not_base: list[str] = []  # modules that are saved whole, or that an adapter is merged into
    for path, module in model.named_modules():
        is_head = isinstance(module, ModulesToSaveWrapper)
        if is_head or getattr(module, "merged_adapters", None):
            not_base.append(f"{path}.")
    config = model.peft_config[slots.adapter]
    trains_biases = config.bias != "none"
    base = {}
    adapted = []
    for name, value in state.items():
        is_added = "lora_" in name or "trainable_tokens" in name or name.startswith(tuple(not_base))
        if is_added or _address(value) in kept or (trains_biases and name.endswith("bias")):
            continue
        plain = uncompiled(name.removeprefix(PREFIX))
        plain = plain.replace(".token_adapter.", ".").replace(".base_layer.", ".")
        plain = before_replication(plain, config.layer_replication)
        base[plain] = value
        if ".base_layer." in name:
            adapted.append(plain)
    samples = base_samples(base_of(model), base, adapted)
    if config.layer_replication:
        samples["settings"].pop(DEPTH, None)  # that of the copies
    return samples


def _address(value: Tensor) -> int:
    """Where a tensor, or this process's part of it, is."""
    return part_here(value).data_ptr()
