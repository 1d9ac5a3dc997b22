"""The seam to PEFT: attach LoRA, find its slots, put another module in one, refuse what cannot be made stochastic."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Embedding, LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from bayestune.layers import DrawnLinear, GaussianLinear, Noise, RowGroups, share_inputs

ADAPTER = "default"
PREFIX = "base_model.model."
SIDES = ("lora_A", "lora_B")
_TARGETS = (("q_proj", "v_proj"), ("query", "value"), ("q_lin", "v_lin"))  # Llama and most others; BERT; DistilBERT


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
    if isinstance(model, PeftModel) or any(isinstance(module, LoraLayer) for module in model.modules()):
        raise ValueError(
            "the model has an adapter already: got a PEFT model, expected a plain one; call unload() on it"
        )
    leaves = {name.rpartition(".")[2] for name, module in model.named_modules() if not list(module.children())}
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


def adapted_layers(model: nn.Module, adapter: str = ADAPTER) -> dict[str, LoraLayer]:
    """The modules that hold the adapter, by their path in the base model (the same with or without PEFT's wrapper)."""
    return {
        name.removeprefix(PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and (adapter in module.lora_A or adapter in module.lora_embedding_A)
    }


def slots(model: nn.Module, adapter: str = ADAPTER) -> dict[str, nn.Module]:
    """The modules in the adapter's slots A and B, by slot name: a layer's path and ".lora_A" or ".lora_B"."""
    return {
        f"{path}.{side}": getattr(layer, side)[adapter]
        for path, layer in adapted_layers(model, adapter).items()
        for side in SIDES
        if adapter in getattr(layer, side)
    }


def slot_names(
    model: nn.Module, sides: Collection[str] = ("lora_A",), modules: Collection[str] = (), adapter: str = ADAPTER
) -> list[str]:
    """Names of the adapter's slots, of some sides and, if `modules` is not empty, of layers with these names only."""
    names = [name.rpartition(".") for name in slots(model, adapter)]
    return [
        f"{path}.{side}"
        for path, _, side in names
        if side in sides and (not modules or path.rpartition(".")[2] in modules)
    ]


def gaussian_layers(model: nn.Module, adapter: str = ADAPTER) -> dict[str, GaussianLinear]:
    """The Gaussian layers of a model that `bayesify` has converted, by slot name."""
    return {name: slot for name, slot in slots(model, adapter).items() if isinstance(slot, GaussianLinear)}


def adapter_weights(model: nn.Module, adapter: str = ADAPTER) -> dict[str, Tensor]:
    """The adapter's matrices, A (r, k) and B (d, r), by slot name: the mean where a slot is Gaussian."""
    return {name: slot.get_parameter("weight").detach() for name, slot in slots(model, adapter).items()}


def head_modules(model: nn.Module, adapter: str = ADAPTER) -> dict[str, nn.Module]:
    """The modules that PEFT trains and saves whole beside the adapter (`modules_to_save`), by path."""
    return {
        name.removeprefix(PREFIX): module.modules_to_save[adapter]
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save
    }


def detach(model: nn.Module) -> nn.Module:
    """Takes the adapters off and gives back the base as it was: PEFT's `unload` would leave a trained head in it."""
    heads = {n: m.original_module for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)}
    base = model.unload()  # type: ignore[operator]
    for name, module in heads.items():
        base.set_submodule(name.removeprefix(PREFIX), module)
    return base


def _reason_to_refuse(layer: LoraLayer, side: str, adapter: str) -> str | None:
    if isinstance(layer, Embedding) or adapter in layer.lora_embedding_A:
        return "it adapts an embedding, which looks A up instead of applying it"
    if isinstance(layer, ParamWrapper):
        return "it adapts a bare parameter (target_parameters), which merges A into the weight"
    if isinstance(layer, MultiheadAttention):
        return "nn.MultiheadAttention merges A into the weight in its forward pass"
    if adapter in getattr(layer, "lora_variant", {}):
        return f"its variant {type(layer.lora_variant[adapter]).__name__} does not apply A once as a plain map"
    slot = getattr(layer, side)[adapter]
    if isinstance(slot, GaussianLinear):
        return "it has been converted already"
    if type(slot) is not nn.Linear:
        return f"its {side} is a {type(slot).__name__}, not a plain Linear"
    return None


def replaceable_slots(
    model: nn.Module, names: Collection[str] | None = None, adapter: str = ADAPTER
) -> dict[str, nn.Linear]:
    """The plain Linear modules in some slots, each checked to be applied once as a plain map.

    Args:
        model: a PEFT model.
        names: slot names; None for every A.
        adapter: which adapter.

    Raises:
        ValueError: if there is no such slot, or one cannot be replaced; each is named with its reason.
    """
    layers = adapted_layers(model, adapter)
    if not layers or (names is not None and not names):
        raise ValueError(
            f"no LoRA layer holds the adapter {adapter!r}: got a {type(model).__name__}, expected a model from "
            "peft.get_peft_model with LoraConfig; check target_modules and the adapter's name"
        )
    places = [(p, "lora_A") for p in layers] if names is None else [_place(name) for name in names]
    if unknown := [path for path, _ in places if path not in layers]:
        raise ValueError(f"no such LoRA layer: got {unknown[:3]}, expected paths among {list(layers)[:3]} …")
    refused = {path: reason for path, side in places if (reason := _reason_to_refuse(layers[path], side, adapter))}
    if refused:
        lines = "\n".join(f"  {path}: {reason}" for path, reason in refused.items())
        raise ValueError(
            f"{len(refused)} of {len(places)} LoRA layers cannot be made stochastic, none was converted; "
            f"leave them out of target_modules or use plain LoRA there:\n{lines}"
        )
    return {f"{path}.{side}": getattr(layers[path], side)[adapter] for path, side in places}


def _place(name: str) -> tuple[str, str]:
    path, _, side = name.rpartition(".")
    return path, side


def put(model: nn.Module, modules: Mapping[str, nn.Module], adapter: str = ADAPTER) -> None:
    """Puts modules in the adapter's slots, by slot name; PEFT calls whatever is there."""
    layers = adapted_layers(model, adapter)
    for name, module in modules.items():
        path, side = _place(name)
        getattr(layers[path], side)[adapter] = module


def bayesify(
    model: nn.Module,
    *,
    init_root_std: float = 0.05,
    noise: Noise = "row",
    adapter: str = ADAPTER,
    slots: Collection[str] | None = None,
) -> int:
    """Makes A of every LoRA layer Gaussian, in place, on a stock PEFT model: q(A) = N(M, Ω²), with M the present A.

    Afterwards training mode draws one A for each row of the batch and evaluation mode uses the mean. All layers are
    checked before any is converted.

    Args:
        model: the model that `peft.get_peft_model` returned.
        init_root_std: ε; G = √Ω starts uniform on (ε/√2, ε).
        noise: "row", "independent" or "token", see `GaussianLinear`.
        adapter: which adapter of the model.
        slots: which slots, as `slot_names` gives them; None for A of every layer.

    Returns:
        How many slots were converted.

    Raises:
        ValueError: if the model has no layer with this adapter, or one of them cannot be made stochastic (DoRA and
            other variants, embeddings, `target_parameters`, a slot that is no plain Linear, a second conversion);
            each is named with its reason.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...                      num_attention_heads=2)
        >>> model = get_peft_model(LlamaForCausalLM(config), LoraConfig(target_modules=["q_proj", "v_proj"]))
        >>> bayesify(model)
        4
    """
    plain, groups = replaceable_slots(model, slots, adapter), RowGroups()
    gaussian = {name: GaussianLinear(slot, init_root_std, noise, groups) for name, slot in plain.items()}
    put(model, share_inputs(gaussian, adapted_layers(model, adapter), adapter), adapter)
    return len(plain)


def group_rows(model: nn.Module, size: int) -> None:
    """Says that `size` consecutive sequences make one row and share their draw in training; kept until set again."""
    for module in model.modules():
        if isinstance(groups := getattr(module, "groups", None), RowGroups):
            groups.size = size
            return


@contextmanager
def drawn(model: nn.Module, weights: Mapping[str, Tensor], adapter: str = ADAPTER) -> Iterator[None]:
    """Puts S fixed weights in the adapter's slots for the time of the context.

    Args:
        model: a PEFT model; its batches must hold S·N rows, draw by draw.
        weights: for each slot name the stack, (S, r, k) for A and (S, d, r) for B; slots left out keep their module.
        adapter: which adapter.

    Raises:
        ValueError: if a name is not a slot of the model.
    """
    present = slots(model, adapter)
    if unknown := sorted(set(weights) - set(present)):
        raise ValueError(f"draws for slots that the model has not: got {unknown[:3]}, expected slots of its adapter")
    kept = {name: present[name] for name in weights}
    stacks = {
        name: DrawnLinear.of(stack, like=kept[name].get_parameter("weight")).train(kept[name].training)
        for name, stack in weights.items()
    }
    try:
        put(model, stacks, adapter)
        yield
    finally:
        put(model, kept, adapter)


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
