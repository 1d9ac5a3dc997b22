"""Writes an adapter as PEFT does, with all that its function needs, and what a posterior adds."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import ModulesToSaveWrapper, get_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

import bayestune
from bayestune.adapters.base_samples import DEPTH, RUNNING, base_samples, before_replication
from bayestune.adapters.locks import base_of
from bayestune.adapters.lora import input_embedding, output_head
from bayestune.adapters.slots import ADAPTER, PREFIX, Slots
from bayestune.adapters.spread import part_here, shape_of, state_of
from bayestune.errors import Refusal
from bayestune.runtime import follow_umask

FORMAT = 1
CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
TENSORS = "posterior.safetensors"
DETAILS = "posterior.json"
FILES = (CONFIG, *WEIGHTS, TENSORS, DETAILS)  # the last one says that the others are whole

# Inits that take B·A out of the base's weights.
_CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_COMPILED = "_orig_mod."  # in the names of layers that are compiled one by one
_INSIDE_WRAPPERS = ("lora_", "trainable_tokens", "modules_to_save", "original_module")


def refuse_changed_base(model: nn.Module, adapter: str) -> None:
    """Refuses an adapter whose initialisation changed the weights of the base under it.

    What is saved is B and A alone, and on the base as it was they are another function.
    """
    config: Any = getattr(model, "peft_config", {}).get(adapter)
    init = getattr(config, "init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_CHANGE_BASE):
        raise Refusal(
            f"the adapter {adapter!r} cannot be saved right: got init_lora_weights={init!r}, which "
            "changes the base model's weights, expected one that leaves them; use the default, "
            '"gaussian", "orthogonal" or "eva", or save the changed base first and load it: '
            "model.unload().save_pretrained(…), with a fresh LoraConfig on it"
        )


def refuse_unless_saved_whole(slots: Slots) -> None:
    """Refuses an adapter that does something its saved configuration would not say."""
    model = slots.model
    if not isinstance(model, PeftModel) or slots.adapter not in model.peft_config:
        raise Refusal(
            f"the adapter {slots.adapter!r} cannot be saved: got a {type(model).__name__}, "
            "expected the model that peft.get_peft_model returned; make the adapter with it; one "
            "that a model's own add_adapter made is saved by its model.save_pretrained(folder)"
        )
    config: Any = model.peft_config[slots.adapter]
    if config.peft_type != "LORA":
        raise Refusal(
            f"the adapter {slots.adapter!r} is no LoRA: got {config.peft_type.value}, expected "
            "LORA; save it with model.save_pretrained"
        )
    refuse_changed_base(model, slots.adapter)
    for module in model.modules():
        if isinstance(module, TrainableTokensWrapper) and slots.adapter not in module._adapters:
            raise Refusal(
                f"PEFT cannot save the adapter {slots.adapter!r}: got one without "
                f"trainable_token_indices beside {sorted(module._adapters)} with them, expected "
                "all or none to have them; take the others off with delete_adapter first"
            )
    _refuse_own_scaling(slots, rslora=config.use_rslora)
    together = [name for name in model.active_adapters if name != slots.adapter]
    if slots.adapter in model.active_adapters and together:
        raise Refusal(
            f"the adapter {slots.adapter!r} is used together with others: got the active adapters "
            f"{model.active_adapters}, expected it alone; merge the others into the base before "
            "the fit, or activate it alone with set_adapter"
        )


def _refuse_own_scaling(slots: Slots, *, rslora: bool) -> None:
    """Refuses a layer whose scaling is not α/r, or α/√r, as its configuration says."""
    for path, layer in slots.layers.items():
        rank = layer.r[slots.adapter] ** (0.5 if rslora else 1)
        configured = layer.lora_alpha[slots.adapter] / rank
        scaling = layer.scaling[slots.adapter]
        if abs(scaling - configured) > 1e-6 * abs(configured):
            raise Refusal(
                f"a scaling that is not saved: got {scaling:g} in {path}, expected {configured:g}, "
                "which the configuration says; call unscale_layer, or set lora_alpha or "
                "alpha_pattern"
            )


def kept_beside(slots: Slots, state: Mapping[str, Tensor]) -> list[str]:
    """Names of what changes the function beside what PEFT saves of an adapter.

    These are parameters of the base that are trained, heads that start from random numbers and are
    not trained, running statistics, and the embeddings of a resized vocabulary.
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


def plain_state(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The model's state, or the one given, as with plain slots: no `root_std` and the like."""
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
        plain[_uncompiled(name)] = value.detach().cpu().clone().contiguous()
    save_file(plain, folder / WEIGHTS[0], metadata={"format": "pt"})
    (folder / WEIGHTS[1]).unlink(missing_ok=True)


def _uncompiled(name: str) -> str:
    return name.replace(_COMPILED, "")


def facts_of(slots: Slots, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What `posterior.json` says of any adapter: its mean's digest, its base, what is beside it."""
    beside = kept_beside(slots, state)
    facts: dict[str, Any] = {"mean_digest": mean_digest(slots, state)}
    facts["base_samples"] = _samples(slots, state, beside)
    if beside:
        facts["kept_beside"] = [_uncompiled(name) for name in beside]
    rows = _rows(slots.model)
    if rows is not None and is_resized(slots.model):
        facts["embedding_rows"] = rows
    return facts


def facts_without_wrapper(slots: Slots, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """`facts_of` an adapter without PEFT's wrapper, whose folder holds nothing beside it."""
    return {"mean_digest": mean_digest(slots), "base_samples": _samples(slots, state, [])}


def _rows(model: nn.Module) -> int | None:
    embedding: Any = input_embedding(model)
    return None if embedding is None else shape_of(embedding.weight)[0]


def mean_digest(slots: Slots, state: Mapping[str, Tensor] | None = None) -> str:
    """SHA-256 of A and B in the slots or a plain state: no std is loaded around another mean."""
    weights = slots.weights() if state is None else _weights(slots, state)
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(weight.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _weights(slots: Slots, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A and B of the state by slot name: where a model is sharded, the state has them whole."""
    by_name = {_uncompiled(name): value for name, value in state.items()}
    names = map(_uncompiled, slots.modules())
    return {n: by_name[f"{PREFIX}{n}.{slots.adapter}.weight"].detach() for n in names}


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
        plain = _uncompiled(name.removeprefix(PREFIX))
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


def write_posterior(
    folder: Path, record: Mapping[str, Any], tensors: Mapping[str, Tensor] | None
) -> None:
    """Writes `posterior.json` and, of the tensors if any, `posterior.safetensors` to a folder."""
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
