"""Schedule-free optimisers, which train an average of iterates that their state holds."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from bayestune.errors import Refusal
from bayestune.kl.remainders import Remainders


def hooks_around(
    optimizer: Any, before: Callable[[Any, Any, Any], Any], after: Callable[[Any], None]
) -> list[Any]:
    """Calls one function before each step of an optimiser, and another one after it.

    A wrapper that makes another optimiser schedule-free has no hooks of its own, and those of the
    optimiser inside it would see iterates in place of the parameters. So its `step` is replaced.

    Args:
        optimizer: one of torch's, or such a wrapper.
        before: a step pre-hook, as torch calls it with the optimiser, args and kwargs: it returns
            new ones or None.
        after: is called with the optimiser.

    Returns:
        Handles, whose `remove()` ends this.
    """
    if hasattr(optimizer, "register_step_pre_hook"):
        return [
            optimizer.register_step_pre_hook(before),
            optimizer.register_step_post_hook(lambda optimizer, *_: after(optimizer)),
        ]
    return [_StepOfWrapper(optimizer, before, after)]


class _StepOfWrapper:
    """Replaces a wrapper's `step` by one that calls two functions around it; is its handle."""

    def __init__(
        self, optimizer: Any, before: Callable[..., Any], after: Callable[..., Any]
    ) -> None:
        self._optimizer = optimizer
        original_step = optimizer.step

        def step(*args: Any, **options: Any) -> Any:
            changed = before(optimizer, (optimizer, *args), options)
            if changed is not None:
                hook_args, options = changed
                args = hook_args[1:]  # after the optimiser
            loss = original_step(*args, **options)
            after(optimizer)
            return loss

        optimizer.step = step

    def remove(self) -> None:
        """Gives the wrapper its own step back."""
        vars(self._optimizer).pop("step", None)


@contextmanager
def iterates_following(
    parameters: Iterable[nn.Parameter], optimizer: Any, values: Remainders
) -> Iterator[None]:
    """Moves the iterates of parameters by as much as the parameters are moved in the context.

    A schedule-free optimiser takes its steps on an iterate z of each parameter, and pulls the
    parameter, an average of the iterates, towards z. A step on the parameter alone would fade away.

    Args:
        parameters: that may be moved in the context.
        optimizer: whose state may hold iterates; if it has none, nothing is done.
        values: reads and sets parameters and iterates in float32.
    """
    parameters = list(parameters)
    _refuse_inner(parameters, optimizer)
    iterates = []
    if is_schedule_free(optimizer):
        for parameter in parameters:
            iterate = _iterate_of(parameter, optimizer)
            if iterate is not None:
                iterates.append((parameter, iterate, values.value(parameter).clone()))
    yield
    for parameter, iterate, value_before in iterates:
        value = values.value(iterate)
        value.add_(values.value(parameter) - value_before)
        values.set_value(iterate, value)


def _refuse_inner(parameters: Iterable[nn.Parameter], optimizer: Optimizer) -> None:
    """Refuses one of torch's optimisers in whose state a wrapper keeps iterates."""
    is_torchs = type(optimizer).__module__.startswith("torch.optim.")
    if is_torchs and any(_iterate_of(parameter, optimizer) is not None for parameter in parameters):
        raise Refusal(
            "the KL step would move a schedule-free wrapper's iterates: got the optimiser inside "
            f"it, {type(optimizer).__name__}, expected the wrapper; call attach(model, wrapper, …)"
        )


def is_schedule_free(optimizer: Any) -> bool:
    """By its name, or by the `eval` that such optimisers have and others do not."""
    named = any("ScheduleFree" in kind.__name__ for kind in type(optimizer).__mro__)
    return named or callable(getattr(optimizer, "eval", None))


def _iterate_of(parameter: nn.Parameter, optimizer: Any) -> Tensor | None:
    iterate = optimizer.state.get(parameter, {}).get("z")
    is_one = isinstance(iterate, Tensor) and iterate.shape == parameter.shape
    return iterate if is_one else None
