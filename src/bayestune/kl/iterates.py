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
    """Calls a function before each step of an optimiser, as torch's hooks, and one after it.

    A wrapper that makes another optimiser schedule-free has no hooks. The inner one's would see
    iterates in the parameters' place.

    Returns:
        Handles, which `remove` takes off.
    """
    if hasattr(optimizer, "register_step_pre_hook"):
        return [
            optimizer.register_step_pre_hook(before),
            optimizer.register_step_post_hook(lambda *given: after(given[0])),
        ]
    return [_StepOfWrapper(optimizer, before, after)]


class _StepOfWrapper:
    """A wrapper's step between two functions."""

    def __init__(
        self, optimizer: Any, before: Callable[..., Any], after: Callable[..., Any]
    ) -> None:
        self._optimizer = optimizer
        taken = optimizer.step

        def step(*args: Any, **options: Any) -> Any:
            given = before(optimizer, (optimizer, *args), options)
            if given is not None:
                args, options = given[0][1:], given[1]
            loss = taken(*args, **options)
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
    """Moves iterates by as much as their parameters are moved in the context.

    A schedule-free optimiser takes its steps on an iterate z of each parameter, and pulls the
    parameter, an average of them, towards it. A step on the parameter alone would fade away.
    """
    parameters = list(parameters)
    _refuse_inner(parameters, optimizer)
    followed = []
    for parameter in parameters if _averages(optimizer) else ():
        iterate = _iterate_of(parameter, optimizer)
        if iterate is not None:
            followed.append((parameter, iterate, values.value(parameter).clone()))
    yield
    for parameter, iterate, before in followed:
        value = values.value(iterate)
        value.add_(values.value(parameter) - before)
        values.put(iterate, value)


def _refuse_inner(parameters: Iterable[nn.Parameter], optimizer: Optimizer) -> None:
    """Refuses one of torch's optimisers in whose state a wrapper keeps iterates."""
    own = type(optimizer).__module__.startswith("torch.optim.")
    if own and any(_iterate_of(parameter, optimizer) is not None for parameter in parameters):
        raise Refusal(
            "the KL step would move a schedule-free wrapper's iterates: got the optimiser inside "
            f"it, {type(optimizer).__name__}, expected the wrapper; call attach(model, wrapper, …)"
        )


def _averages(optimizer: Any) -> bool:
    named = any("ScheduleFree" in kind.__name__ for kind in type(optimizer).__mro__)
    return named or callable(getattr(optimizer, "eval", None))


def _iterate_of(parameter: nn.Parameter, optimizer: Any) -> Tensor | None:
    found = optimizer.state.get(parameter, {}).get("z")
    return found if isinstance(found, Tensor) and found.shape == parameter.shape else None
