"""Figures of a gate and of classes in a record, and bars that a record's figures must clear."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from bayestune.data import Question
from bayestune.decisions import (
    Gate,
    class_figures,
    free_baselines,
    gate,
    macro_f1,
)
from bayestune.errors import Refusal, nearest
from bayestune.metrics import confusion

_BAR = re.compile(r"\s*([\w.]+)\s*(<=|>=|<|>)\s*([-+.\deE]+)\s*")
_METRICS = ("accuracy", "nll", "brier", "ece", "aurc")
_OF_CLASSES = ("macro_f1",)
_OF_CALIBRATED = ("acted", "risk", "cost")
_SHARES = {"accuracy", "ece", "aurc", "augrc", "coverage_at_risk_5", "risk_at_coverage_80"}
_SHARES |= {"confidently_wrong", "macro_f1", *_OF_CALIBRATED}  # from 0 to 1, but in % in tables
_SIGNS = str.maketrans({"≤": "<=", "≥": ">="})
_ALIASES = {"wrong_at_0.8": "wrong_at_80", "wrong_at_0.9": "wrong_at_90"}


def gate_record(probabilities: Tensor, questions: Sequence[Question]) -> dict[str, Any]:
    """What a record says of a gate on the confidence, and of baselines that need no model.

    Args:
        probabilities: (N, C).
        questions: N rows, all with an answer.
    """
    answers = torch.tensor([row.answer for row in questions])
    sizes = torch.tensor([len(row.options) for row in questions])
    return asdict(gate(probabilities, answers)) | free_baselines(answers, sizes)


def class_record(probabilities: Tensor, questions: Sequence[Question]) -> dict[str, Any] | None:
    """What a record says of the classes, where all rows have the same options; None elsewhere.

    Classes are in the order of the first row's options. "confusion" has a row of counts for each
    right answer and a column for each choice; what is not defined, such as the precision of a class
    that was never chosen, is null.
    """
    names = questions[0].options
    alike = all(sorted(row.options) == sorted(names) for row in questions)
    if not alike or len(set(names)) < len(names):
        return None
    if any(row.options != names for row in questions):
        places = torch.tensor([list(map(row.options.index, names)) for row in questions])
        probabilities = probabilities.gather(1, places.to(probabilities.device))
    rows = [row.with_options(names) for row in questions]
    answers = torch.tensor([row.answer for row in rows])
    by_class = class_figures(probabilities, answers)
    classes = []
    for name, figures in zip(names, by_class, strict=True):
        values = {key: _none_if_nan(value) for key, value in asdict(figures).items()}
        classes.append({"name": name, **values})
    counts = confusion(probabilities.argmax(-1), answers, len(names))
    return {"classes": classes, "macro_f1": macro_f1(by_class), "confusion": counts.tolist()}


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value


@dataclass(frozen=True)
class Bar:
    """A bound that a figure of a record must keep, such as nll<=0.7 or wrong_at_0.9<=2."""

    figure: str
    sign: str
    bound: float

    @classmethod
    def of(cls, text: str) -> Self:
        """The bar that a text such as "nll<=0.7" means.

        Raises:
            Refusal: if the text is not a figure, a sign and a number, no record has the figure, or
                a share is bounded in per cent.

        >>> Bar.of("wrong_at_0.9<=2")
        Bar(figure='wrong_at_90', sign='<=', bound=2.0)
        """
        match = _BAR.fullmatch(text.translate(_SIGNS))
        if match is None:
            raise Refusal(f"got {text!r}; expected such as 'nll<=0.7'; give a figure and a bound")
        name = match[1].casefold()
        name = _ALIASES.get(name, name)
        of_gates = [field.name for field in fields(Gate)]
        figures = list(dict.fromkeys([*_METRICS, *of_gates, *_OF_CLASSES, *_OF_CALIBRATED]))
        if name not in figures:
            near = nearest(name, figures)
            hint = f"did you mean {near!r}?" if near else "choose one"
            raise Refusal(f"got the figure {name!r}; expected one of {figures}; {hint}")
        try:
            bound = float(match[3])
        except ValueError:
            raise Refusal(f"got {text!r}; expected a number at the end; correct it") from None
        if name in _SHARES and bound > 1:
            expected = "a share from 0 to 1, which tables show in %"
            raise Refusal(
                f"got {text!r}; expected {expected}; write {bound / 100:g} for {bound:g} %"
            )
        return cls(name, match[2], bound)

    def of_record(self, record: Mapping[str, Any]) -> float:
        """The figure of a record; NaN if it has none, such as a risk without a calibration."""
        if self.figure in record["metrics"]:
            value = record["metrics"][self.figure]["value"]
        elif self.figure in _OF_CLASSES:
            value = record.get("by_class", {}).get(self.figure)
        else:
            value = record["gate"].get(self.figure)
        return math.nan if value is None else float(value)

    def holds(self, record: Mapping[str, Any]) -> bool:
        """Whether a record's figure keeps the bound; NaN never does."""
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
