"""Tells by samples of its weights whether a base is the one that an adapter was fitted on."""

import re
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from bayestune.adapters.locks import base_of
from bayestune.adapters.precision import precision_of
from bayestune.adapters.spread import shape_of, whole

TENSORS = 16  # sampled of a base, and one of each kind that is not among them
VALUES = 16  # sampled of each of them

# the list of layers that PEFT copies
_COPIED = re.compile(r"((?:model\.|bert\.)*(?:encoder\.layer|layers|h)\.)(\d+)\.")

# in the names of what adapters, and modules that are trained whole, add to a base
_ADDED = ("lora_", "modules_to_save", "trainable_tokens")
_BEFORE_LAYER = (".token_adapter.", ".base_layer.", ".original_module.")  # that an adapter wraps
# statistics of quantised weights, which devices round unlike each other
_OF_QUANTISED = (".absmax", ".nested_absmax", ".quant_map", ".nested_quant_map", ".SCB")
RUNNING = ("running_mean", "running_var", "num_batches_tracked")

DEPTH = "num_hidden_layers"
# What changes a model's function and leaves no trace in its weights.
_SETTINGS = (
    DEPTH,
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "rope_theta",
    "sliding_window",
    "rms_norm_eps",
    "layer_norm_eps",
)


def base_samples(
    model: nn.Module, state: Mapping[str, Tensor], adapted: Collection[str] = ()
) -> dict[str, Any]:
    """Samples of a base's weights, first to last, some of its settings, and its precision.

    Quantised tensors, their statistics, and off-loaded ones are left out. So the same tensors are
    sampled of a base in float32, in bfloat16 and spread over processes.

    Args:
        model: the base, whose `config` is read if it has one.
        state: its tensors by name.
        adapted: names of tensors that merging an adapter and taking it out again changes a little.
    """
    names = []
    for name, value in state.items():
        if _is_plain(value) and not name.endswith(_OF_QUANTISED):
            names.append(name)
    tensors = {}
    for name in _sampled(names):
        value = whole(state[name])
        tensors[name] = {
            "shape": list(value.shape),
            "dtype": str(value.dtype).removeprefix("torch."),
            "values": _values(value).tolist(),
            "adapted": name in adapted,
        }
    return {
        "tensors": tensors,
        "settings": _settings(model),
        "precision": precision_of(model),
    }


def frozen_samples(model: nn.Module) -> dict[str, Any]:
    """`base_samples` of a base, the same with and without an adapter that leaves it as it is.

    Left out are what an adapter trains beside A and B, biases, which it may train, and heads on a
    model's body, which may start anew each time.

    Args:
        model: the base, or a PEFT model of it.
    """
    return base_samples(base_of(model), _frozen(model))


def differs_frozen(saved: Mapping[str, Any], model: nn.Module) -> list[str]:
    """Names of what is not as `frozen_samples` found it, in a base with or without an adapter."""
    return _differing(saved, base_of(model), _frozen(model))


def _frozen(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a base's body that no adapter changes, by their names in the base."""
    base = base_of(model)
    has_head = isinstance(base, PreTrainedModel) and base.get_output_embeddings() is None
    state: dict[str, Tensor] = (base.base_model if has_head else base).state_dict(keep_vars=True)
    is_adapted = any("lora_" in name for name in state)
    frozen = {}
    for name, value in state.items():
        is_trained = is_adapted and value.requires_grad
        may_change = is_trained or name.endswith((*RUNNING, "bias"))
        if may_change or any(part in name for part in _ADDED):
            continue
        frozen[_plain(name)] = value
    return frozen


def _plain(name: str) -> str:
    """The name that a tensor has in the base without an adapter's and a compiler's wrappers."""
    for wrapped in _BEFORE_LAYER:
        name = name.replace(wrapped, ".")
    return name.replace("_orig_mod.", "")


def before_replication(name: str, spans: Sequence[Sequence[int]] | None) -> str:
    """The name that a tensor has in the base whose layers PEFT's `layer_replication` has copied.

    Args:
        name: of the tensor in the model with the copies.
        spans: beginning and end of each run of layers, as the configuration gives them.

    Example:
        >>> before_replication("model.layers.2.mlp.up_proj.weight", [[0, 2], [1, 3]])
        'model.layers.1.mlp.up_proj.weight'
    """
    match = _COPIED.match(name)
    if not spans or match is None:
        return name
    originals = list(chain.from_iterable(range(*span) for span in spans))  # of each copy
    return f"{match[1]}{originals[int(match[2])]}{name[match.end(2) :]}"


def differs(saved: Mapping[str, Any], model: nn.Module) -> list[str]:
    """Names of tensors and settings of a base that are not as they were sampled.

    Args:
        saved: what `base_samples` returned for the base that was fitted on.
        model: the base at hand.
    """
    state = model.state_dict(keep_vars=True)
    state = {name.removeprefix("_orig_mod."): value for name, value in state.items()}
    return _differing(saved, model, state)


def _differing(
    saved: Mapping[str, Any], model: nn.Module, state: Mapping[str, Tensor]
) -> list[str]:
    differing = []
    for name, sample in saved["tensors"].items():
        if name in state and _is_plain(state[name]) and not _agrees(sample, whole(state[name])):
            differing.append(name)
    present = _settings(model)
    for name, value in saved["settings"].items():
        if name in present and present[name] != value:
            differing.append(name)
    return differing


def _is_plain(value: Tensor) -> bool:
    """Whether a tensor is neither quantised nor off-loaded nor empty."""
    is_here = type(value) in (Tensor, nn.Parameter, DTensor) and value.device.type != "meta"
    is_empty = shape_of(value).numel() == 0
    return is_here and value.is_floating_point() and value.itemsize > 1 and not is_empty


def _sampled(names: Sequence[str]) -> list[str]:
    """Names evenly from the first to the last, and one of each kind that is not among them.

    Tensors whose names differ in numbers alone, such as a layer's, are of one kind.
    """
    if len(names) <= TENSORS:
        return list(names)
    chosen = {names[i * (len(names) - 1) // (TENSORS - 1)] for i in range(TENSORS)}
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    for of_kind in kinds.values():
        if chosen.isdisjoint(of_kind):
            chosen.add(of_kind[len(of_kind) // 2])
    return [name for name in names if name in chosen]


def _values(tensor: Tensor) -> Tensor:
    """Evenly from a tensor's first entry to its last, float64 on the CPU."""
    last = tensor.numel() - 1
    positions = [i * last // (VALUES - 1) for i in range(VALUES)]
    flat = tensor.detach().flatten()
    return flat[torch.tensor(positions, device=tensor.device)].cpu().double()


def _agrees(sample: Mapping[str, Any], present: Tensor) -> bool:
    """Whether a tensor is the sampled one, in the less precise type of the two."""
    if list(present.shape) != sample["shape"]:
        return False
    saved_dtype: torch.dtype = getattr(torch, sample["dtype"])
    coarse = max(saved_dtype, present.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    saved = torch.tensor(sample["values"], dtype=torch.float64).to(coarse).double()
    values = _values(present).to(coarse).double()
    if saved_dtype == present.dtype and not sample["adapted"]:
        return torch.equal(saved.nan_to_num(), values.nan_to_num())
    eps = torch.finfo(coarse).eps
    rounding = max(4 * eps, 1e-3) if sample["adapted"] else eps
    close = (saved - values).abs() <= rounding * saved.abs().clamp_min(saved.abs().mean())
    return bool((close | (saved.isnan() & values.isnan())).all())


def _settings(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    settings = {name: getattr(config, name, None) for name in _SETTINGS}
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, Mapping):
        settings["rope_theta"] = rope.get("rope_theta", settings["rope_theta"])
    return {name: value for name, value in settings.items() if isinstance(value, int | float | str)}
