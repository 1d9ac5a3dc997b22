"""What a KL step needs of its surroundings: the adapter, the optimiser, gradients, processes."""

from collections.abc import Collection, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers.trainer_callback import CallbackHandler

from bayestune.adapters import GaussianLinear, Slots, shape_of, whole
from bayestune.errors import Refusal
from bayestune.kl.zero_optimizer import groups_of

Layers = Mapping[str, GaussianLinear]


def gaussian_layers(model: nn.Module, adapter: str | None) -> Layers:
    """The Gaussian layers of an adapter by slot name.

    Without a name it is the Gaussian adapter among the active ones.

    Raises:
        Refusal: if it has no Gaussian layer, or several active adapters have.
    """
    active, others = _gaussian_adapters(model)
    if adapter is None and len(active) > 1:
        raise Refusal(
            f"which adapter is meant is not clear: got the active Gaussian adapters {active}, "
            "expected one; take a KLStep(adapter=…) for each"
        )
    slots = Slots(model, active[0] if adapter is None and active else adapter)
    layers = slots.of_kind(GaussianLinear)
    if not layers:
        choice = f" among {[*active, *others]}" if active or others else ""
        raise Refusal(
            f"the model has no Gaussian layer: got the deterministic adapter {slots.adapter!r}; "
            f"call bayesify(model) first, or name the Gaussian adapter{choice}"
        )
    return layers


def _gaussian_adapters(model: nn.Module) -> tuple[list[str], list[str]]:
    """The adapters with Gaussian layers: those that are active somewhere, and the others."""
    active: dict[str, None] = {}  # ordered sets
    others: dict[str, None] = {}
    for path, module in model.named_modules():
        if isinstance(module, GaussianLinear):
            slot, _, adapter = path.rpartition(".")
            owner: Any = model.get_submodule(slot.rpartition(".")[0])
            names = active if adapter in owner.active_adapters else others
            names[adapter] = None
    return list(active), [name for name in others if name not in active]


def with_trained_std(layers: Layers) -> Layers:
    """Those of some layers whose G is trained."""
    return {name: layer for name, layer in layers.items() if layer.root_std.requires_grad}


def check_optimizer(optimizer: Any, layers: Layers, *, moves_root_std: bool) -> None:
    """Refuses an optimiser that was built without G, or would decay it.

    Args:
        optimizer: of the run.
        layers: the Gaussian layers.
        moves_root_std: whether the optimiser moves G, instead of the KL step.
    """
    _refuse_steps_in_backward(optimizer)
    _refuse_frozen_a(optimizer)
    groups = list(groups_of(optimizer))
    held = {id(p) for _, parameters in groups for p in parameters}
    trained = with_trained_std(layers)
    if not trained:
        raise Refusal(
            f"no standard deviation is trained: got {len(layers)} frozen root_std, expected "
            "requires_grad; call model.set_adapter(…), which makes the adapter active and trained, "
            "and build the optimiser after it"
        )
    missing = [name for name, layer in trained.items() if id(layer.root_std) not in held]
    if missing:
        kind = type(optimizer).__name__
        raise Refusal(
            f"the optimiser does not hold the standard deviations: got a {kind} without root_std "
            f"of {_some(missing)}, expected all trainable parameters; build the optimiser after "
            "bayesify(model), and one that holds the model's own parameters"
        )
    flat = [name for name, layer in trained.items() if len(shape_of(layer.root_std)) != 2]
    if flat:
        raise Refusal(
            f"the standard deviations are cut into flat pieces: got root_std of {_some(flat)} with "
            "one axis (FSDP 1?), expected (r, k); use FSDP 2 (fully_shard, fsdp_version: 2)"
        )
    if not moves_root_std:
        return
    root_stds = {id(layer.root_std) for layer in trained.values()}
    for group, parameters in groups:
        if group.get("weight_decay") and root_stds & {id(p) for p in parameters}:
            raise Refusal(
                "weight decay would shrink the standard deviation: got "
                f"weight_decay={group['weight_decay']} on root_std, expected 0; set "
                'weight_decay=0 or std_optimizer="sgd"'
            )


def _refuse_steps_in_backward(optimizer: Any) -> None:
    """Refuses optimisers that step inside the backward pass: there is no `step()` to follow."""
    kind = type(optimizer).__name__
    releases = getattr(optimizer, "defaults", {}).get("gradient_release")
    if releases or hasattr(optimizer, "fused_backward") or kind == "LayerWiseDummyOptimizer":
        raise Refusal(
            f"the KL step follows the optimiser's step(): got {kind}, which steps inside the "
            "backward pass, expected one that steps after it; take another, such as "
            'optim="adamw_torch"'
        )


def _refuse_frozen_a(optimizer: Any) -> None:
    """Refuses PEFT's LoRA-FA, which freezes A and pairs parameters by their order."""
    kind = type(optimizer).__name__
    if kind == "LoraFAOptimizer":
        raise Refusal(
            f"LoRA-FA freezes A, which has the standard deviation: got a {kind}, expected an "
            "optimiser that trains A; call model.set_adapter(…), which lets A be trained again, "
            "and build another optimiser, such as torch.optim.AdamW"
        )


def check_gradients(layers: Layers) -> list[str]:
    """Refuses the first gradients if the noise of a layer was not in the pass.

    Returns:
        The layers that no gradient has reached, see `without_gradient`.
    """
    trained = with_trained_std(layers)
    unreached = {name: layer for name, layer in trained.items() if layer.root_std.grad is None}
    drawing = [name for name, layer in unreached.items() if layer.training]
    bypassed = [name for name in drawing if unreached[name].weight.grad is not None]
    refuse_unreached(trained, list(unreached), bypassed)
    return without_gradient(layers, trained)


def refuse_unreached(
    trained: Layers, unreached: Collection[str], bypassed: Collection[str]
) -> None:
    """Refuses a first step whose passes were at the mean, or did not call the layers' modules.

    Args:
        trained: the layers whose G is trained.
        unreached: those of them whose G has no gradient.
        bypassed: those of them whose mean has a gradient all the same.
    """
    drawing = [name for name in unreached if trained[name].training]
    all_unreached = len(unreached) == len(trained)
    if all_unreached and not drawing:
        raise Refusal(
            f"the model is at its mean: got {len(unreached)} Gaussian layers in evaluation mode, "
            "expected training mode, in which they draw; call model.train()"
        )
    passed_by = [name for name in drawing if name in bypassed]
    if all_unreached:
        _refuse_bypassed(passed_by or drawing, "any", len(trained))
    if passed_by:
        _refuse_bypassed(passed_by, len(passed_by), len(trained))


def without_gradient(layers: Layers, names: Collection[str]) -> list[str]:
    """Those of the named layers whose G has no gradient, or one of 0 everywhere.

    They were not called, or B is 0. A layer that was not called may have a gradient of 0 because
    another one, which receives the same tensor, computes its ranks too.

    Raises:
        Refusal: if the mean of one has a gradient other than 0, though its module was not called.
    """
    unreached = {name: layers[name] for name in names if not _has_gradient(layers[name].root_std)}
    drawing = {name: layer for name, layer in unreached.items() if layer.training}
    bypassed = [name for name, layer in drawing.items() if _has_gradient(layer.weight)]
    if bypassed:
        _refuse_bypassed(bypassed, len(bypassed), len(layers))
    return list(unreached)


def _has_gradient(parameter: Tensor) -> bool:
    """Whether a parameter has a gradient that is not 0 everywhere."""
    return parameter.grad is not None and bool(parameter.grad.any())


def _refuse_bypassed(names: list[str], how_many: int | str, count: int) -> NoReturn:
    raise Refusal(
        f"no gradient reached {how_many} of the {count} Gaussian layers: got none for "
        f"{_some(names)}, because something applies LoRA without calling its modules (a fused "
        "kernel?), so the noise would be lost; switch that kernel off"
    )


def check_synchronised(layers: Layers) -> None:
    """Refuses a pass under a DistributedDataParallel that was made before G was there."""
    wrapper: Any = DistributedDataParallel._get_active_ddp_module()
    if wrapper is None:
        return
    synchronised = {id(parameter) for parameter in wrapper._module_parameters}
    unknown = [name for name, layer in layers.items() if id(layer.root_std) not in synchronised]
    if unknown:
        raise Refusal(
            "processes would not share the gradients of the standard deviations: got a "
            f"DistributedDataParallel made before bayesify, without root_std of {_some(unknown)}, "
            "expected bayesify first; wrap the model again"
        )


def put_first(callback: Any, frame: Any) -> None:
    """Moves a callback before the others of its Trainer, so that trackers see what it logs.

    A Trainer puts trackers (`report_to`) before a user's callbacks, and gives a callback no access
    to the others, so their list is taken from the frame that calls it.

    Args:
        callback: to be moved.
        frame: of the `CallbackHandler` that calls it.
    """
    handler = frame.f_locals.get("self") if frame else None
    if isinstance(handler, CallbackHandler) and callback in handler.callbacks:
        handler.callbacks.remove(callback)
        handler.callbacks.insert(0, callback)


def rows_of(dataloader: Any) -> int | None:
    """The rows of a data loader's data set; None if it has no length, as an iterable one."""
    try:
        return len(dataloader.dataset)
    except (AttributeError, TypeError, NotImplementedError):
        return None


def whole_value(tensor: Tensor) -> Tensor:
    """A parameter's value in float32 or better, whole where it is spread over processes."""
    value = whole(tensor).detach()
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _some(names: list[str]) -> str:
    return f"{names[:3]}{' …' if len(names) > 3 else ''}"
