"""The error of everything that this package refuses, so that a refusal is told from a crash.

Settings check their numbers with `check_fields`, when they are made: before a model is loaded.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import cache
from numbers import Integral, Real
from typing import Any, Literal, get_args, get_origin, get_type_hints


class Refusal(ValueError):
    """What was asked cannot be done right: the message says got, expected, remedy."""


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that is most like one given; None if none is alike.

    >>> nearest("qestion", ["question", "context"])
    'question'
    """
    return next(iter(get_close_matches(name, list(known), 1, cutoff)), None)


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may have.

    Args:
        said: the range in words.
        low: the least.
        high: the largest.
        open_low: whether `low` itself is too small.
        open_high: whether `high` itself is too large.
        whole: whether only whole numbers will do.
    """

    said: str
    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    whole: bool = False

    def __contains__(self, value: Any) -> bool:
        kind = Integral if self.whole else Real
        if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value):
            return False
        number = float(value)
        above = number > self.low if self.open_low else number >= self.low
        below = number < self.high if self.open_high else number <= self.high
        return above and below


NUMERIC = Range("a finite number")
COUNT = Range("a whole number of 1 or more", low=1, whole=True)
NUMBER = Range("a whole number of 0 or more", low=0, whole=True)
SEED = Range("a whole number from 0 to 2³² − 1", low=0, high=2**32 - 1, whole=True)
POSITIVE = Range("a number above 0", low=0, open_low=True)
NOT_NEGATIVE = Range("a number of 0 or more", low=0)
PART = Range("a number from 0 to below 1", low=0, high=1, open_high=True)
WHOLE_PART = Range("a number from 0 to 1", low=0, high=1)
INNER_PART = Range("a number above 0 and below 1", low=0, high=1, open_low=True, open_high=True)


def check_fields(settings: Any, **ranges: Range) -> None:
    """Checks numbers among a dataclass's fields, and every field that has a list of choices.

    None passes where it is the default.

    Raises:
        Refusal: if a number lies outside of its range or is none, or a choice is unknown.
    """
    for name, choices in _choices(type(settings)).items():
        value = getattr(settings, name)
        if value not in choices:
            alike = nearest(str(value), [str(choice) for choice in choices])
            hint = f"; did you mean {alike!r}?" if alike else "; correct it"
            raise Refusal(
                f"{type(settings).__name__}.{name}: got {value!r}, expected one of {choices}{hint}"
            )
    defaults = {field.name: field.default for field in fields(settings)}
    for name, allowed in ranges.items():
        value = getattr(settings, name)
        if value is None and defaults[name] is None:
            continue
        if value not in allowed:
            raise Refusal(
                f"{type(settings).__name__}.{name}: got {value!r}, expected {allowed.said}; "
                "correct it"
            )


@cache
def _choices(kind: type) -> dict[str, tuple[Any, ...]]:
    """The values that each field of a dataclass may have, of those whose type lists them."""
    hints = get_type_hints(kind)
    found = {}
    for field in fields(kind):
        hint = hints[field.name]
        optional = [each for each in get_args(hint) if get_origin(each) is Literal]
        if get_origin(hint) is Literal:
            found[field.name] = get_args(hint)
        elif optional:
            found[field.name] = (*get_args(optional[0]), None)
    return found
