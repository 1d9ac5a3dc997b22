"""The error of everything that this package refuses, so that a refusal is told from a crash.

Settings check their numbers with `check_fields`, when they are made: before a model is loaded.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any


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
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return bool(above and below)


COUNT = Range("a whole number of 1 or more", low=1, whole=True)
NUMBER = Range("a whole number of 0 or more", low=0, whole=True)
SEED = Range("a whole number from 0 to 2³² − 1", low=0, high=2**32 - 1, whole=True)
POSITIVE = Range("a number above 0", low=0, open_low=True)
NOT_NEGATIVE = Range("a number of 0 or more", low=0)
PART = Range("a number from 0 to below 1", low=0, high=1, open_high=True)
WHOLE_PART = Range("a number from 0 to 1", low=0, high=1)
INNER_PART = Range("a number above 0 and below 1", low=0, high=1, open_low=True, open_high=True)


def check_fields(settings: Any, **ranges: Range) -> None:
    """Checks numbers among a dataclass's fields; None passes where it is the default.

    Raises:
        Refusal: if one lies outside of its range, or is not a number.
    """
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
