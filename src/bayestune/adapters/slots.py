"""LoRA's slots A and B in a PEFT model: finds them, puts modules in them, refuses what cannot be replaced."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from peft.tuners.lora import Embedding, LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from bayestune.adapters.drawn_linear import DrawnLinear

ADAPTER = "default"
PREFIX = "base_model.model."
SIDES = ("lora_A", "lora_B")


def adapted_layers(model: nn.Module, adapter: str = ADAPTER) -> dict[str, LoraLayer]:
    """The modules that hold the adapter, by their path in the base model (the same with or without PEFT's wrapper)."""
    return {
        name.removeprefix(PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
        and (adapter in module.lora_A or adapter in module.lora_embedding_A)
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
    model: nn.Module,
    sides: Collection[str] = ("lora_A",),
    modules: Collection[str] = (),
    adapter: str = ADAPTER,
) -> list[str]:
    """Names of the adapter's slots, of some sides and, if `modules` is not empty, of layers with these names only."""
    names = [name.rpartition(".") for name in slots(model, adapter)]
    return [
        f"{path}.{side}"
        for path, _, side in names
        if side in sides and (not modules or path.rpartition(".")[2] in modules)
    ]


def adapter_weights(model: nn.Module, adapter: str = ADAPTER) -> dict[str, Tensor]:
    """The adapter's matrices, A (r, k) and B (d, r), by slot name: the mean where a slot is Gaussian."""
    return {
        name: slot.get_parameter("weight").detach() for name, slot in slots(model, adapter).items()
    }


def head_modules(model: nn.Module, adapter: str = ADAPTER) -> dict[str, nn.Module]:
    """The modules that PEFT trains and saves whole beside the adapter (`modules_to_save`), by path."""
    return {
        name.removeprefix(PREFIX): module.modules_to_save[adapter]
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save
    }


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
    if hasattr(slot, "root_std"):
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
        raise ValueError(
            f"no such LoRA layer: got {unknown[:3]}, expected paths among {list(layers)[:3]} …"
        )
    refused = {
        path: reason
        for path, side in places
        if (reason := _reason_to_refuse(layers[path], side, adapter))
    }
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


@contextmanager
def drawn(
    model: nn.Module, weights: Mapping[str, Tensor], adapter: str = ADAPTER
) -> Iterator[None]:
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
        raise ValueError(
            f"draws for slots that the model has not: got {unknown[:3]}, expected slots of its adapter"
        )
    kept = {name: present[name] for name in weights}
    stacks = {
        name: DrawnLinear.of(stack, like=kept[name].get_parameter("weight")).train(
            kept[name].training
        )
        for name, stack in weights.items()
    }
    try:
        put(model, stacks, adapter)
        yield
    finally:
        put(model, kept, adapter)
