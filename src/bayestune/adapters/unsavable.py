"""Refuses an adapter that would be another function when it is loaded from its own files."""

from typing import Any

from peft import PeftModel
from peft.utils.other import TrainableTokensWrapper
from torch import nn

from bayestune.adapters.slots import Slots
from bayestune.errors import Refusal

# initialisations that take B·A out of the base's weights
_CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def refuse_changed_base(model: nn.Module, adapter: str) -> None:
    """Refuses an adapter whose initialisation changed the weights of the base under it.

    What is saved is B and A alone, and on the base as it was they are another function.

    Args:
        model: with the adapter.
        adapter: its name.

    Raises:
        Refusal: if `init_lora_weights` is such an initialisation.
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
    """Refuses an adapter that does something its saved files would not say.

    Raises:
        Refusal: without PEFT's model, for another kind of adapter than LoRA, a base that its
            initialisation changed, tokens trained in other adapters alone, a scaling of its own,
            or other adapters that are active with it.
    """
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
    others = [name for name in model.active_adapters if name != slots.adapter]
    if slots.adapter in model.active_adapters and others:
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
