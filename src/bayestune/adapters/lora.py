"""Attaches LoRA to a model and detaches it, and tells what kind of model it is."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers.models.auto import modeling_auto

from bayestune.adapters.locks import base_of, exclusive
from bayestune.adapters.slots import PREFIX
from bayestune.adapters.wrapped import unwrapped
from bayestune.errors import COUNT, PART, POSITIVE, Refusal, check_fields, nearest

_TEXT_HEADS = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
_OTHER_HEADS: tuple[Any, ...] = (
    modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES,
)
# Llama and most others; BERT; DistilBERT
_TARGETS = (("q_proj", "v_proj"), ("query", "value"), ("q_lin", "v_lin"))


@dataclass(frozen=True)
class Lora:
    """The adapter to train: the paper's settings by default.

    Args:
        rank: r, the rank of the adapter's matrices.
        alpha: the adapter's output is scaled by alpha/rank.
        dropout: the probability of LoRA dropout on the adapter's input.
        targets: names of the adapted modules; None means the paper's: q_proj and v_proj (query and
            value in encoders), and lm_head where it is not tied to the embedding.
    """

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_fields(self, rank=COUNT, alpha=POSITIVE, dropout=PART)
        if isinstance(self.targets, str):
            raise Refusal(
                f"Lora.targets: got {self.targets!r}, expected names in a list; give "
                f"({self.targets!r},)"
            )


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that gives a language model's logits; None for models without one."""
    base = base_of(model)
    return base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None


def input_embedding(model: nn.Module) -> nn.Module | None:
    """The layer that looks a model's tokens up; None for models of images, speech and the like."""
    try:
        embedding = base_of(model).get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return embedding if hasattr(embedding, "weight") else None


def head_is_tied(model: nn.Module) -> bool:
    """Whether the output head and the embedding are one matrix."""
    head = output_head(model)
    embedding = input_embedding(model)
    return head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", None)


def is_classifier(model: nn.Module) -> bool:
    """Whether a transformers model ends in a classification head instead of a language model's."""
    return type(model).__name__ in _TEXT_HEADS.values()


def _kind_of_task(model: nn.Module) -> dict[str, Any]:
    """The task type of a model for `LoraConfig`, or the parts that are trained beside LoRA.

    PEFT has no task type for pictures and sounds, so there the parts of the head are named.
    """
    if is_classifier(model):
        return {"task_type": "SEQ_CLS"}
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return {"task_type": "SEQ_2_SEQ_LM"}
    name = type(model).__name__
    if any(_is_among(name, heads) for heads in _OTHER_HEADS):
        return {"modules_to_save": head_parts(model)}
    takes_text = (
        hasattr(model, "prepare_inputs_for_generation") and input_embedding(model) is not None
    )
    return {"task_type": "CAUSAL_LM"} if takes_text else {}


def head_parts(model: nn.Module) -> list[str]:
    """The paths of a classifier's modules beside its body, which are trained whole."""
    body = getattr(model, "base_model", model)
    return [path for path, child in model.named_children() if child is not body]


def _is_among(class_name: str, heads: Mapping[str, Any]) -> bool:
    """Whether a class is in one of transformers' tables: a class, or several, for each model."""
    for entry in heads.values():
        class_names = entry if isinstance(entry, tuple | list) else (entry,)
        if class_name in class_names:
            return True
    return False


def attach(model: nn.Module, lora: Lora) -> PeftModel:
    """Puts a fresh LoRA adapter on a model, as `peft.get_peft_model` does, and freezes the rest.

    A classification head, if the model has one, is trained beside LoRA.

    Args:
        model: a transformers model without adapters.
        lora: the adapter's settings.

    Raises:
        Refusal: if no module has a target's name, or the model has an adapter already.
    """
    if any(isinstance(module, PeftModel | LoraLayer) for module in model.modules()):
        raise Refusal(
            "the model has an adapter already: got LoRA layers, expected none; take the result of "
            "unload() on a PEFT model, or load the base anew"
        )
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(_targets_in(model, lora.targets)),
        **_kind_of_task(model),
    )
    with old_names_unsaid():
        adapted = get_peft_model(model, config)  # type: ignore[arg-type]
    if getattr(model, "is_quantized", False):
        # PEFT leaves it out, and reentrant checkpoints would cut the gradients off
        model.enable_input_require_grads()  # type: ignore[operator]
    return adapted


def _targets_in(model: nn.Module, chosen: Sequence[str] | None) -> Sequence[str]:
    """The names of the modules to adapt: the chosen ones, or else the paper's.

    Raises:
        Refusal: if no module has a target's name.
    """
    paths = [path for path, module in model.named_modules() if not list(module.children())]
    leaves = {path.rpartition(".")[2] for path in paths}
    targets = chosen
    if not targets:
        targets = next((names for names in _TARGETS if leaves >= set(names)), _TARGETS[0])
        if not (is_classifier(model) or head_is_tied(model)):
            targets = (*targets, "lm_head")
    unknown = [name for name in targets if not _is_named(name, paths)]
    # names of other families may stand in a list for several models
    elsewhere = {name for names in _TARGETS for name in names}
    if unknown and (len(unknown) == len(targets) or not elsewhere.issuperset(unknown)):
        alike = nearest(unknown[0].rpartition(".")[2], leaves)
        hint = f"did you mean {alike!r}?" if alike else "set the targets"
        raise Refusal(
            f"no module to adapt: got targets {unknown}, expected names among "
            f"{sorted(leaves)}; {hint}"
        )
    return targets


@contextmanager
def old_names_unsaid() -> Iterator[None]:
    """Suppresses transformers' warning that PEFT reads a property by its old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


def _is_named(target: str, paths: Sequence[str]) -> bool:
    """Whether PEFT finds a module under a target's name: all of its path, or the end of it."""
    return any(path == target or path.endswith(f".{target}") for path in paths)


def detach(model: nn.Module) -> nn.Module:
    """Takes the adapters off and returns the base as it was, without a trained head."""
    heads = {}
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            heads[name.removeprefix(PREFIX)] = module.original_module
    base = model.unload()  # type: ignore[operator]
    for name, module in heads.items():
        base.set_submodule(name, module)
    return base


@contextmanager
def active(model: nn.Module, adapter: str, *, alone: bool = False) -> Iterator[None]:
    """Makes an adapter of a PEFT model active for the time of the context.

    Args:
        model: the PEFT model; of others nothing is changed.
        adapter: the adapter's name.
        alone: whether adapters that are active beside it are switched off. What was active and
            what was trainable is restored.
    """
    model = unwrapped(model)
    before = model.active_adapters if isinstance(model, PeftModel) else [adapter]
    if before == [adapter] or (adapter in before and not alone):
        yield
        return
    peft: Any = model
    name = peft.active_adapter
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    peft.set_adapter(adapter)
    try:
        yield
    finally:
        peft.set_adapter(name)
        peft.base_model.set_adapter(before)  # which takes several, as the wrapper's does not
        model.requires_grad_(False)
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's mode is restored afterwards.

    Other threads that ask this package for passes of the model wait for the end of the context.
    """
    with exclusive(model):
        modes = {module: module.training for module in model.modules()}
        if any(modes.values()):
            model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module, training in modes.items():
                module.training = training
