"""Schedule-free optimisers, which train an average of iterates that their state holds."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from bayestune.kl.remainders import Remainders


@contextmanager
def iterates_following(
    parameters: Iterable[nn.Parameter], optimizer: Any, values: Remainders
) -> Iterator[None]:
    """Moves iterates by as much as their parameters are moved in the context.

    A schedule-free optimiser takes its steps on an iterate z of each parameter, and pulls the
    parameter, an average of them, towards it. A step on the parameter alone would fade away.
    """
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


def _averages(optimizer: Any) -> bool:
    named = any("ScheduleFree" in kind.__name__ for kind in type(optimizer).__mro__)
    return named or callable(getattr(optimizer, "eval", None))


def _iterate_of(parameter: nn.Parameter, optimizer: Any) -> Tensor | None:
    found = optimizer.state.get(parameter, {}).get("z")
    return found if isinstance(found, Tensor) and found.shape == parameter.shape else None
