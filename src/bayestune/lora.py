"""The seam to PEFT: attach LoRA, find its slots, put another module in one, refuse what cannot be made stochastic."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Embedding, LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from torch import Tensor, nn

from bayestune.layers import DrawnLinear, GaussianLinear, Noise, RowGroups

ADAPTER = "default"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Lora:
    """The adapter to train: the paper's settings by default.

    Args:
        rank: r.
        alpha: the adapter's output is scaled by alpha/rank.
        dropout: LoRA dropout on the adapter's input, a probability.
        targets: names of the adapted modules; None means the paper's, q_proj and v_proj, and lm_head where it is
            not tied to the embedding.
    """

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None


def head_is_tied(model: nn.Module) -> bool:
    """Whether the output head and the embedding are one matrix."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    return head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", None)


def attach(model: nn.Module, lora: Lora) -> PeftModel:
    """A stock PEFT model with a fresh LoRA adapter on `model`, whose own weights are frozen.

    Args:
        model: a transformers model without adapters.
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
    targets = lora.targets or (("q_proj", "v_proj") if head_is_tied(model) else ("q_proj", "v_proj", "lm_head"))
    leaves = {name.rpartition(".")[2] for name, module in model.named_modules() if not list(module.children())}
    if not any(target.rpartition(".")[2] in leaves for target in targets):
        raise ValueError(
            f"no module to adapt: got targets {list(targets)}, expected names among {sorted(leaves)}; set the targets"
        )
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(targets),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)  # type: ignore[arg-type]


def adapted_layers(model: nn.Module, adapter: str = ADAPTER) -> dict[str, LoraLayer]:
    """The modules that hold the adapter, by their path in the base model (the same with or without PEFT's wrapper)."""
    return {
        name.removeprefix(PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and (adapter in module.lora_A or adapter in module.lora_embedding_A)
    }


def gaussian_layers(model: nn.Module, adapter: str = ADAPTER) -> dict[str, GaussianLinear]:
    """The Gaussian layers of a model that `bayesify` has converted, by path."""
    slots = {path: layer.lora_A[adapter] for path, layer in adapted_layers(model, adapter).items()}
    return {path: slot for path, slot in slots.items() if isinstance(slot, GaussianLinear)}


def _reason_to_refuse(layer: LoraLayer, adapter: str) -> str | None:
    if isinstance(layer, Embedding) or adapter in layer.lora_embedding_A:
        return "it adapts an embedding, which looks A up instead of applying it"
    if isinstance(layer, ParamWrapper):
        return "it adapts a bare parameter (target_parameters), which merges A into the weight"
    if isinstance(layer, MultiheadAttention):
        return "nn.MultiheadAttention merges A into the weight in its forward pass"
    if adapter in getattr(layer, "lora_variant", {}):
        return f"its variant {type(layer.lora_variant[adapter]).__name__} does not apply A once as a plain map"
    slot = layer.lora_A[adapter]
    if isinstance(slot, GaussianLinear):
        return "it has been converted already"
    if type(slot) is not nn.Linear:
        return f"its lora_A is a {type(slot).__name__}, not a plain Linear"
    return None


def bayesify(model: nn.Module, *, init_root_std: float = 0.05, noise: Noise = "row", adapter: str = ADAPTER) -> int:
    """Makes A of every LoRA layer Gaussian, in place, on a stock PEFT model: q(A) = N(M, Ω²), with M the present A.

    Afterwards training mode draws one A for each row of the batch and evaluation mode uses the mean. All layers are
    checked before any is converted.

    Args:
        model: the model that `peft.get_peft_model` returned.
        init_root_std: ε; G = √Ω starts uniform on (ε/√2, ε).
        noise: "row", "independent" or "token", see `GaussianLinear`.
        adapter: which adapter of the model.

    Returns:
        How many layers were converted.

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
    layers = adapted_layers(model, adapter)
    if not layers:
        raise ValueError(
            f"no LoRA layer holds the adapter {adapter!r}: got a {type(model).__name__}, expected a model from "
            "peft.get_peft_model with LoraConfig; check target_modules and the adapter's name"
        )
    refused = {path: reason for path, layer in layers.items() if (reason := _reason_to_refuse(layer, adapter))}
    if refused:
        lines = "\n".join(f"  {path}: {reason}" for path, reason in refused.items())
        raise ValueError(
            f"{len(refused)} of {len(layers)} LoRA layers cannot be made stochastic, none was converted; "
            f"leave them out of target_modules or use plain LoRA there:\n{lines}"
        )
    groups = RowGroups()
    for layer in layers.values():
        plain = layer.lora_A[adapter]
        assert isinstance(plain, nn.Linear)  # _reason_to_refuse has checked it
        layer.lora_A[adapter] = GaussianLinear(plain, init_root_std, noise, groups)
    return len(layers)


def group_rows(model: nn.Module, size: int) -> None:
    """Says that `size` consecutive sequences make one row and share their draw in training; kept until set again."""
    for module in model.modules():
        if isinstance(module, GaussianLinear):
            module.groups.size = size
            return


@contextmanager
def drawn(model: nn.Module, weights: Mapping[str, Tensor], adapter: str = ADAPTER) -> Iterator[None]:
    """Puts S fixed weights in the adapter's slots for the time of the context.

    Args:
        model: a PEFT model; its batches must hold S·N rows, draw by draw.
        weights: for each path the stack (S, r, k); paths left out keep their module.
        adapter: which adapter.

    Raises:
        ValueError: if a path is not a layer of the model.
    """
    layers = adapted_layers(model, adapter)
    if unknown := sorted(set(weights) - set(layers)):
        raise ValueError(f"draws for layers that the model has not: got {unknown[:3]}, expected paths of its adapter")
    kept = {path: layers[path].lora_A[adapter] for path in weights}
    try:
        for path, stack in weights.items():
            layers[path].lora_A[adapter] = DrawnLinear.of(stack, like=kept[path].get_parameter("weight"))
        yield
    finally:
        for path, slot in kept.items():
            layers[path].lora_A[adapter] = slot


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
