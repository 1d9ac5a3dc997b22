"""One thread at a time on a model: modules, modes and the active adapter change during a pass."""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from bayestune.adapters.wrapped import unwrapped
from bayestune.errors import Refusal

# beside the models, so that these can be pickled and copied
_LOCKS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
_HELD: weakref.WeakKeyDictionary[nn.Module, list[str]] = weakref.WeakKeyDictionary()
_MAKING = threading.Lock()


def base_of(model: nn.Module) -> Any:
    """The model inside PEFT's and other wrappers, or the model itself."""
    model = unwrapped(model)
    if not hasattr(model, "get_base_model"):
        return model
    return unwrapped(model.get_base_model())  # type: ignore[operator]


@contextmanager
def exclusive(model: nn.Module) -> Iterator[None]:
    """Keeps other threads from passes on the model for the time of the context.

    The lock is the base model's, so that all adapters and wrappers around it share it; a thread may
    take it again while it holds it. Everything in this package that puts modules in slots or
    changes modes takes it. Calls of the model itself and training do not.
    """
    base = base_of(model)
    with _MAKING:
        lock = _LOCKS.setdefault(base, threading.RLock())
    with lock:
        yield


@contextmanager
def marked_as_drawn(model: nn.Module, adapter: str) -> Iterator[None]:
    """Notes that draws stand in an adapter's slots for the time of the context."""
    held = _HELD.setdefault(base_of(model), [])
    held.append(adapter)
    try:
        yield
    finally:
        held.remove(adapter)


def refuse_inside_drawn(model: nn.Module, adapter: str | None = None) -> None:
    """Refuses to ask a posterior, or to save it, while draws stand in its adapter's slots.

    Raises:
        Refusal: inside `drawn()` on this adapter; on any, for None.
    """
    held = _HELD.get(base_of(model), [])
    if adapter in held or (held and adapter is None):
        adapter = adapter or held[0]
        raise Refusal(
            f"the slots of the adapter {adapter!r} hold other draws: got a prediction, a draw or "
            "a save inside drawn(), expected it outside; leave the context first, or call the "
            "model itself"
        )
