"""Attaches LoRA to a model and detaches it, and tells what kind of model it is."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from bayestune.adapters.slots import PREFIX

_TARGETS = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("q_lin", "v_lin"),
)  # Llama and most others; BERT; DistilBERT


@dataclass(frozen=True)
class Lora:
    """The adapter to train: the paper's settings by default.

    Args:
        rank: r.
        alpha: the adapter's output is scaled by alpha/rank.
        dropout: LoRA dropout on the adapter's input, a probability.
        targets: names of the adapted modules; None means the paper's, q_proj and v_proj (query and value in encoders),
            and lm_head where there is one that is not tied to the embedding.
    """

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None


def head_is_tied(model: nn.Module) -> bool:
    """Whether the output head and the embedding are one matrix."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    return head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", None)


def is_classifier(model: nn.Module) -> bool:
    """Whether a transformers model ends in a classification head instead of a language model's."""
    return type(model).__name__ in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values()


def _default_targets(model: nn.Module, leaves: set[str]) -> tuple[str, ...]:
    query_value = next((names for names in _TARGETS if leaves >= set(names)), _TARGETS[0])
    return query_value if is_classifier(model) or head_is_tied(model) else (*query_value, "lm_head")


def attach(model: nn.Module, lora: Lora) -> PeftModel:
    """A stock PEFT model with a fresh LoRA adapter on `model`, whose own weights are frozen.

    Args:
        model: a transformers model without adapters; a classification head is trained with the adapter, as PEFT does.
        lora: rank, scale, dropout and targets.

    Returns:
        The model of `peft.get_peft_model`.

    Raises:
        ValueError: if no module has a target's name, or the model has an adapter already.
    """
    if isinstance(model, PeftModel) or any(
        isinstance(module, LoraLayer) for module in model.modules()
    ):
        raise ValueError(
            "the model has an adapter already: got a PEFT model, expected a plain one; call unload() on it"
        )
    leaves = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if not list(module.children())
    }
    targets = lora.targets or _default_targets(model, leaves)
    if not any(target.rpartition(".")[2] in leaves for target in targets):
        raise ValueError(
            f"no module to adapt: got targets {list(targets)}, expected names among {sorted(leaves)}; set the targets"
        )
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(targets),
        task_type="SEQ_CLS" if is_classifier(model) else "CAUSAL_LM",
    )
    return get_peft_model(model, config)  # type: ignore[arg-type]


def base_of(model: nn.Module) -> Any:
    """The transformers model, with or without PEFT's wrapper around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def detach(model: nn.Module) -> nn.Module:
    """Takes the adapters off and gives back the base as it was: PEFT's `unload` would leave a trained head in it."""
    heads = {
        n: m.original_module
        for n, m in model.named_modules()
        if isinstance(m, ModulesToSaveWrapper)
    }
    base = model.unload()  # type: ignore[operator]
    for name, module in heads.items():
        base.set_submodule(name.removeprefix(PREFIX), module)
    return base


@contextmanager
def active(model: nn.Module, adapter: str) -> Iterator[None]:
    """Makes an adapter the active one; the one before is active again afterwards, and what is trainable is kept."""
    before: Any = model.active_adapter
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.set_adapter(adapter)  # type: ignore[operator]
    try:
        yield
    finally:
        model.set_adapter(before)  # type: ignore[operator]
        model.requires_grad_(False)
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's mode is restored afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
