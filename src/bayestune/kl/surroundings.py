"""What a KL step needs of its surroundings: the adapter, the optimiser, gradients, processes."""

from collections.abc import Collection, Mapping
from typing import Any

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
        known = f" among {[*active, *others]}" if active or others else ""
        raise Refusal(
            f"the model has no Gaussian layer: got the deterministic adapter {slots.adapter!r}; "
            f"call bayesify(model) first, or name the Gaussian adapter{known}"
        )
    return layers


def _gaussian_adapters(model: nn.Module) -> tuple[list[str], list[str]]:
    """The adapters with Gaussian layers: those that are active, and the others."""
    active: dict[str, None] = {}
    others: dict[str, None] = {}
    for path, module in model.named_modules():
        if isinstance(module, GaussianLinear):
            slot, _, adapter = path.rpartition(".")
            owner: Any = model.get_submodule(slot.rpartition(".")[0])
            found = active if adapter in owner.active_adapters else others
            found[adapter] = None
    return list(active), [name for name in others if name not in active]


def check_optimizer(optimizer: Any, layers: Layers, *, moves_root_std: bool) -> None:
    """Refuses an optimiser that was built without G, or would decay it.

    Args:
        optimizer: the run's.
        layers: the Gaussian layers.
        moves_root_std: whether it is the optimiser that moves G.
    """
    _refuse_steps_in_backward(optimizer)
    groups = list(groups_of(optimizer))
    held = {id(p) for _, parameters in groups for p in parameters}
    learnt = {name: layer for name, layer in layers.items() if layer.root_std.requires_grad}
    if not learnt:
        raise Refusal(
            f"no standard deviation is trained: got {len(layers)} frozen root_std, expected "
            "requires_grad; make the adapter the active one with model.set_adapter(…)"
        )
    missing = [name for name, layer in learnt.items() if id(layer.root_std) not in held]
    if missing:
        kind = type(optimizer).__name__
        raise Refusal(
            f"the optimiser does not hold the standard deviations: got a {kind} without root_std "
            f"of {_some(missing)}, expected all trainable parameters; build the optimiser after "
            "bayesify(model), and one that holds the model's own parameters"
        )
    if flat := [name for name, layer in learnt.items() if len(shape_of(layer.root_std)) != 2]:
        raise Refusal(
            f"the standard deviations are cut into flat pieces: got root_std of {_some(flat)} with "
            "one axis (FSDP 1?), expected (r, k); use FSDP 2 (fully_shard, fsdp_version: 2)"
        )
    root_stds = {id(layer.root_std) for layer in learnt.values()}
    for group, parameters in groups if moves_root_std else ():
        if group.get("weight_decay") and root_stds & {id(p) for p in parameters}:
            raise Refusal(
                "weight decay would shrink the standard deviation: got "
                f"weight_decay={group['weight_decay']} on root_std, expected 0; set "
                'weight_decay=0 or std_optimizer="sgd"'
            )


def _refuse_steps_in_backward(optimizer: Any) -> None:
    """Refuses optimisers that move parameters while gradients come: no step is there to follow."""
    kind = type(optimizer).__name__
    releases = getattr(optimizer, "defaults", {}).get("gradient_release")
    if releases or hasattr(optimizer, "fused_backward") or kind == "LayerWiseDummyOptimizer":
        raise Refusal(
            f"the KL step follows the optimiser's step(): got {kind}, which steps inside the "
            "backward pass, expected one that steps after it; take another, such as "
            'optim="adamw_torch"'
        )


def check_gradients(layers: Layers) -> list[str]:
    """Refuses the first gradients if the noise of a layer was not in the pass.

    Returns:
        The layers that no gradient has reached, see `without_gradient`.
    """
    learnt = {name: layer for name, layer in layers.items() if layer.root_std.requires_grad}
    unreached = {name: one for name, one in learnt.items() if one.root_std.grad is None}
    noisy = [name for name, layer in unreached.items() if layer.training]
    bypassed = [name for name in noisy if unreached[name].weight.grad is not None]
    refuse_unreached(learnt, list(unreached), bypassed)
    return without_gradient(layers, learnt)


def refuse_unreached(learnt: Layers, unreached: Collection[str], bypassed: Collection[str]) -> None:
    """Refuses a first pass at the mean, or past the layers' modules.

    Args:
        learnt: the layers whose G is trained.
        unreached: those of them that no gradient reached at all.
        bypassed: those of them whose mean has a gradient all the same.
    """
    noisy = [name for name in unreached if learnt[name].training]
    nowhere = len(unreached) == len(learnt)
    if nowhere and not noisy:
        raise Refusal(
            f"the model is at its mean: got {len(unreached)} Gaussian layers in evaluation mode, "
            "expected training mode, in which they draw; call model.train()"
        )
    found = [name for name in noisy if name in bypassed]
    if found or nowhere:
        _refuse_bypassed(found or noisy, "any" if nowhere else len(found), len(learnt))


def without_gradient(layers: Layers, names: Collection[str]) -> list[str]:
    """Those of some layers whose G has no gradient, or none but 0: they were not called, or B is 0.

    A layer may have a gradient of 0 because another one, which receives the same tensor, computes
    its ranks too.

    Raises:
        Refusal: if the mean of one has a gradient beyond 0, though its module was not called.
    """
    found = {name: layers[name] for name in names if not _is_moved(layers[name].root_std)}
    noisy = {name: layer for name, layer in found.items() if layer.training}
    if bypassed := [name for name, layer in noisy.items() if _is_moved(layer.weight)]:
        _refuse_bypassed(bypassed, len(bypassed), len(layers))
    return list(found)


def _is_moved(parameter: Tensor) -> bool:
    return parameter.grad is not None and bool(parameter.grad.any())


def _refuse_bypassed(names: list[str], which: int | str, count: int) -> None:
    raise Refusal(
        f"no gradient reached {which} of the {count} Gaussian layers: got none for {_some(names)}, "
        "because something applies LoRA without calling its modules (a fused kernel?), so the "
        "noise would be lost; switch that kernel off"
    )


def check_synchronised(layers: Layers) -> None:
    """Refuses, in a pass under DistributedDataParallel, that the wrapper does not know G."""
    wrapper: Any = DistributedDataParallel._get_active_ddp_module()
    if wrapper is None:
        return
    known = {id(parameter) for parameter in wrapper._module_parameters}
    unknown = [name for name, layer in layers.items() if id(layer.root_std) not in known]
    if unknown:
        raise Refusal(
            "processes would not share the gradients of the standard deviations: got a "
            f"DistributedDataParallel made before bayesify, without root_std of {_some(unknown)}, "
            "expected bayesify first; wrap the model again"
        )


def put_first(callback: Any, frame: Any) -> None:
    """Moves a callback before the others of its Trainer, so that trackers see what it logs.

    A Trainer puts trackers (`report_to`) before a user's callbacks and hands a callback no way to
    the others: the list is found in the Trainer's frame that calls it.
    """
    handler = frame.f_locals.get("self") if frame else None
    if isinstance(handler, CallbackHandler) and callback in handler.callbacks:
        handler.callbacks.remove(callback)
        handler.callbacks.insert(0, callback)


def rows_of(dataloader: Any) -> int | None:
    """The rows of a data loader's data set; None where it does not know, as an iterable one."""
    try:
        return len(dataloader.dataset)
    except (AttributeError, TypeError, NotImplementedError):
        return None


def as_one(tensor: Tensor) -> Tensor:
    """A parameter in float32 or better, whole where it is spread over processes."""
    value = whole(tensor).detach()
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _some(names: list[str]) -> str:
    return f"{names[:3]}{' …' if len(names) > 3 else ''}"
