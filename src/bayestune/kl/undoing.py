"""Refuses optimisers that take back, between their steps, what was done to a parameter."""

import inspect
import io
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bayestune.errors import Refusal
from bayestune.kl.iterates import is_schedule_free

# whose optimisers go on from a parameter's value, and wrappers that only pass a step on
_KNOWN = (
    "accelerate",
    "bitsandbytes",
    "deepspeed",
    "lightning",
    "lightning_fabric",
    "pytorch_lightning",
    "torch",
    "torchao",
    "transformers",
)
_INNER = ("optimizer", "base_optimizer", "_base_optimizer")  # where wrappers keep an optimiser
_STEPS = 12  # of a trial; slow weights are usually set every five or six
_KEPT = 0.9  # of a displacement, at least, without weight decay


def inner_optimizer(optimizer: Any) -> Any:
    """The optimiser inside a wrapper such as accelerate's, or itself.

    Raises:
        Refusal: if one of them takes back what is done between its steps.
    """
    _refuse_undoing(optimizer)
    inner = getattr(optimizer, "optimizer", optimizer)
    if inner is not optimizer:
        _refuse_undoing(inner)
    return inner


def _refuse_undoing(optimizer: Any) -> None:
    """Refuses an optimiser that takes back what is done to a parameter between its steps.

    Some compute the parameter anew from where it started (dual averaging: MADGRAD, D-Adaptation's
    SGD), others pull it back to slow weights (Lookahead, Ranger). They are known by a trial: one of
    the same kind steps on parameters of its own, with and without a displacement.

    Raises:
        Refusal: if less than nine tenths of the displacement are left; of a SAM optimiser, whose
            step leaves a parameter without a gradient where it had been perturbed.
    """
    kind = type(optimizer).__name__
    has_inner = isinstance(getattr(optimizer, "base_optimizer", None), Optimizer)
    if has_inner and hasattr(optimizer, "first_step"):
        raise Refusal(
            f"the KL step would act on perturbed weights: got {kind}, expected the optimiser "
            "inside it, which steps once they are put back; call attach(model, "
            "optimizer.base_optimizer, …)"
        )
    kept = _share_kept(optimizer)
    if kept < _KEPT:
        raise Refusal(
            f"the optimiser takes the KL step back: got {kind}, which leaves {max(kept, 0):.0%} of "
            f"a displacement after {_STEPS} steps, expected one that goes on from a parameter's "
            "value, without slow weights or dual averaging; take another, such as "
            "torch.optim.AdamW"
        )


def _share_kept(optimizer: Any) -> float:
    """The share of a displacement that is left after some steps; 1 if no trial can be made."""
    if is_schedule_free(optimizer) or _is_known(optimizer):
        return 1.0
    displacement = 0.01 * _randn((2, 32, 32), seed=1)
    try:
        with torch.random.fork_rng(devices=[]), redirect_stdout(io.StringIO()):
            moved = _ends_of_trial(optimizer, displacement) - _ends_of_trial(optimizer, None)
    except Exception:  # it needs more than its defaults say, or a GPU
        return 1.0
    shares = (moved * displacement).sum((1, 2)) / displacement.square().sum((1, 2))
    return float(shares.min().nan_to_num(1.0))


def _is_known(optimizer: Any) -> bool:
    kinds = [kind for kind in type(optimizer).__mro__ if kind is not Optimizer]
    return any(kind.__module__.partition(".")[0] in _KNOWN for kind in kinds)


def _ends_of_trial(optimizer: Any, displacement: Tensor | None) -> Tensor:
    """Where steps of the same kind take a parameter with gradients, and one without: (2, 32, 32).

    Args:
        optimizer: whose kind and settings are taken.
        displacement: of both parameters, after three steps.
    """
    torch.default_generator.manual_seed(0)  # the CPU's alone: a GPU's noise goes on as it was
    parameters = [nn.Parameter(_randn((32, 32), seed=number)) for number in range(2)]
    trial = _of_same_kind(optimizer, parameters)
    for step in range(3 + _STEPS):
        parameters[0].grad = _randn((32, 32), seed=step)
        trial.step()
        if step == 2 and displacement is not None:
            for parameter, change in zip(parameters, displacement, strict=True):
                parameter.detach().add_(change)
    return torch.stack([parameter.detach() for parameter in parameters])


def _of_same_kind(optimizer: Any, parameters: list[nn.Parameter]) -> Any:
    kind: Any = type(optimizer)
    taken = inspect.signature(kind).parameters
    defaults = getattr(optimizer, "defaults", {})
    settings = {name: value for name, value in defaults.items() if name in taken}
    if "weight_decay" in settings:
        settings["weight_decay"] = 0.0
    if any(isinstance(getattr(optimizer, name, None), Optimizer) for name in _INNER):
        return kind(torch.optim.SGD(parameters, lr=1e-3), **settings)
    return kind(parameters, **settings)


def _randn(shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal numbers on the CPU, whatever the default device is."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cpu")
