"""Which methods learn on a task's unlabelled rows, so that nothing is chosen on these."""

from typing import Any

from bayestune.data import Question
from bayestune.methods.distilled import Distilled
from bayestune.scoring import Scorer


def learns_unlabelled(method: Any) -> bool:
    """Whether a method, or what it builds on, learns on a task's unlabelled rows.

    Args:
        method: any method.
    """
    return isinstance(method, Distilled) or any(map(learns_unlabelled, inner_methods(method)))


def inner_methods(method: Any) -> list[Any]:
    """The methods that a method builds on, by either name of the field that holds one.

    Args:
        method: any method.
    """
    inner = (getattr(method, "base", None), getattr(method, "method", None))
    return [each for each in inner if each is not None]


def unlabelled_of(base: Any, scorer: Scorer) -> tuple[Question, ...]:
    """The task's unlabelled rows if a method that is built on learns from such; else none."""
    return scorer.task.unlabelled if learns_unlabelled(base) else ()
