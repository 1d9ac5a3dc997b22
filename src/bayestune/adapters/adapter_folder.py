"""The files of an adapter's folder: PEFT's, with all that its function needs, and a posterior's.

`state` is throughout a model's state by name, as `spread.state_of` has it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft.utils import get_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

import bayestune
from bayestune.adapters.base_samples import RUNNING
from bayestune.adapters.locks import base_of
from bayestune.adapters.lora import input_embedding, output_head
from bayestune.adapters.slots import ADAPTER, PREFIX, Slots
from bayestune.adapters.spread import state_of
from bayestune.runtime import follow_umask

FORMAT = 1
CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
TENSORS = "posterior.safetensors"
DETAILS = "posterior.json"
FILES = (CONFIG, *WEIGHTS, TENSORS, DETAILS)  # the last one says that the others are whole

_COMPILED = "_orig_mod."  # in the names of layers that are compiled one by one
_INSIDE_WRAPPERS = ("lora_", "trainable_tokens", "modules_to_save", "original_module")


def plain_state(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """A model's state as with plain slots: without `root_std` and the like.

    Args:
        model: under PEFT.
        state: its state; None to take it from the model.

    Returns:
        Tensors by name.
    """
    state = state_of(model) if state is None else state
    plain = {}
    for name, value in state.items():
        in_slot = ".lora_A." in name or ".lora_B." in name
        if not in_slot or name.endswith((".weight", ".bias")):
            plain[name] = value
    return plain


def add_beside(
    slots: Slots, state: Mapping[str, Tensor], folder: Path, embeddings: Any = False
) -> None:
    """Adds to an adapter's file what PEFT left out, under the names of a plain model.

    Args:
        slots: of the adapter.
        state: the model's plain state.
        folder: where PEFT has written the adapter.
        embeddings: PEFT's `save_embedding_layers`, as it was written with.
    """
    names = kept_beside(slots, state)
    compiled = any(_COMPILED in name for name in state)
    if not names and not compiled:
        return
    model: Any = slots.model
    tensors = get_peft_model_state_dict(
        model, dict(state), slots.adapter, save_embedding_layers=embeddings
    )
    tensors |= {name: state[name] for name in names}
    plain = {}
    for name, value in tensors.items():
        plain[uncompiled(name)] = value.detach().cpu().clone().contiguous()
    save_file(plain, folder / WEIGHTS[0], metadata={"format": "pt"})
    (folder / WEIGHTS[1]).unlink(missing_ok=True)


def kept_beside(slots: Slots, state: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors without which a saved adapter would be another function.

    PEFT does not save these: parameters of the base that are trained, heads that start from random
    numbers and are not trained, running statistics, and the embeddings of a resized vocabulary.

    Args:
        slots: of the adapter.
        state: the model's state.

    Returns:
        Those of them that are in the state, each once.
    """
    model: Any = slots.model
    wrapped: list[str] = []
    statistics: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            wrapped.append(f"{path}.")
        elif hasattr(module, RUNNING[0]):
            statistics += [f"{path}.{name}" for name in RUNNING]
    kept_if_frozen = (*_heads(model), *getattr(model, "kept_beside", ()))
    names = [*statistics, *_embeddings(model)]
    for name, parameter in model.named_parameters():
        peft_saves_it = "lora_" in name or name.startswith(tuple(wrapped))
        if not peft_saves_it and (parameter.requires_grad or name.startswith(kept_if_frozen)):
            names.append(name)
    return [name for name in dict.fromkeys(names) if name in state]


def _heads(model: nn.Module) -> list[str]:
    """Beginnings of the names of what a model for a task has beside its pretrained body."""
    base = base_of(model)
    if not isinstance(base, PreTrainedModel) or base.get_output_embeddings() is not None:
        return []
    body = base.base_model
    if body is base:
        return []
    return [f"{PREFIX}{name}." for name, child in base.named_children() if child is not body]


def _embeddings(model: nn.Module) -> list[str]:
    """Names of the embeddings' weights, in and out, if the vocabulary was resized."""
    if not is_resized(model):
        return []
    embeddings = (input_embedding(model), output_head(model))
    paths = [f"{path}." for path, module in model.named_modules() if module in embeddings]
    names = []
    for name, _ in model.named_parameters():
        if name.startswith(tuple(paths)) and not any(part in name for part in _INSIDE_WRAPPERS):
            names.append(name)
    return names


def is_resized(model: nn.Module) -> bool:
    """Whether the vocabulary is not the one that the base, or the model of its name, began with."""
    base = base_of(model)
    if not isinstance(base, PreTrainedModel):
        return False
    present = getattr(base.config.get_text_config(), "vocab_size", None)
    if present is None:
        return False
    if getattr(base.base_model, "vocab_size", present) != present:  # set once, when it was made
        return True
    if not base.config.name_or_path:
        return False
    try:
        config = AutoConfig.from_pretrained(base.config.name_or_path, local_files_only=True)
    except (OSError, ValueError):
        return False  # not known; samples of the base's weights are compared when it is loaded
    return getattr(config.get_text_config(), "vocab_size", present) != present


def uncompiled(name: str) -> str:
    """A weight's name, or a layer's path, as in a model whose layers are not compiled."""
    return name.replace(_COMPILED, "")


def write_posterior(
    folder: Path, record: Mapping[str, Any], tensors: Mapping[str, Tensor] | None
) -> None:
    """Writes `posterior.json` and, if there are tensors, `posterior.safetensors`.

    Args:
        folder: of the adapter.
        record: what `posterior.json` says beside the format and the version.
        tensors: of the posterior, by name; None if it has none beside its mean.
    """
    if tensors is not None:
        plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        save_file(plain, folder / TENSORS)
    record = {"format": FORMAT, "bayestune": bayestune.__version__, **record}
    text = json.dumps(record, indent=2, default=str) + "\n"
    (folder / DETAILS).write_text(text, encoding="utf-8")
    follow_umask(folder, FILES)


def place_of(folder: Path, adapter: str) -> Path:
    """Where PEFT writes an adapter: those that are not called "default" one folder deeper."""
    return folder if adapter == ADAPTER else folder / adapter
