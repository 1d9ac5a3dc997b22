"""Figures of a gate in a record, and the bars that an evaluation must not fall below."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from bayestune.data import Question
from bayestune.decisions import Gate, free_baselines, gate
from bayestune.errors import Refusal, nearest

_BAR = re.compile(r"\s*([\w.]+)\s*(<=|>=|<|>)\s*([-+.\deE]+)\s*")
_METRICS = ("accuracy", "nll", "brier", "ece", "aurc")
_OF_CALIBRATED = ("acted", "risk")
_OTHERWISE = {"wrong_at_0.8": "wrong_at_80", "wrong_at_0.9": "wrong_at_90"}


def gate_record(probabilities: Tensor, questions: Sequence[Question]) -> dict[str, Any]:
    """What a record says of a gate on the confidence, and what costs nothing beside it."""
    answers = torch.tensor([row.answer for row in questions])
    sizes = torch.tensor([len(row.options) for row in questions])
    return asdict(gate(probabilities, answers)) | free_baselines(answers, sizes)


@dataclass(frozen=True)
class Bar:
    """What a figure of a record must be, such as nll<=0.7 or wrong_at_0.9<=2."""

    figure: str
    sign: str
    bound: float

    @classmethod
    def of(cls, text: str) -> Self:
        """The bar that a text says.

        Raises:
            Refusal: if it is none, or of a figure that no record has.

        >>> Bar.of("wrong_at_0.9<=2")
        Bar(figure='wrong_at_90', sign='<=', bound=2.0)
        """
        match = _BAR.fullmatch(text)
        if match is None:
            raise Refusal(f"got {text!r}; expected such as 'nll<=0.7'; give a figure and a bound")
        name = _OTHERWISE.get(match[1], match[1])
        known = [*_METRICS, *(field.name for field in fields(Gate)), *_OF_CALIBRATED]
        if name not in known:
            near = nearest(name, known)
            hint = f"did you mean {near!r}?" if near else "choose one"
            raise Refusal(f"got the figure {name!r}; expected one of {known}; {hint}")
        try:
            bound = float(match[3])
        except ValueError:
            raise Refusal(f"got {text!r}; expected a number at the end; correct it") from None
        return cls(name, match[2], bound)

    def of_record(self, record: Mapping[str, Any]) -> float:
        """The figure of a record; NaN if it has none, such as a risk without a calibration."""
        if self.figure in record["metrics"]:
            value = record["metrics"][self.figure]["value"]
        else:
            value = record["gate"].get(self.figure)
        return math.nan if value is None else float(value)

    def holds(self, record: Mapping[str, Any]) -> bool:
        """Whether a record's figure is on the right side; NaN never is."""
        value = self.of_record(record)
        return {
            "<=": value <= self.bound,
            ">=": value >= self.bound,
            "<": value < self.bound,
            ">": value > self.bound,
        }[self.sign]

    def said(self, record: Mapping[str, Any]) -> str:
        """The bar, the figure, and whether it holds, in a line."""
        verdict = "holds" if self.holds(record) else "FAILS"
        value = f"{self.of_record(record):.4g}"
        return f"{verdict}  {self.figure} {self.sign} {self.bound:g}: {record['label']} has {value}"
