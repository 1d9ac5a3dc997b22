"""One row: a question with fixed options and the index of the right one."""

from dataclasses import dataclass
from typing import Literal

from bayestune.errors import Refusal

Scoring = Literal["letter", "text", "head"]
LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


@dataclass(frozen=True)
class Question:
    """One row.

    Args:
        id: names the row in errors and predictions.
        question: its text.
        options: at least two.
        answer: index of the right option; None where it is not known.
        context: a passage that the question is about, if any.
    """

    id: str
    question: str
    options: tuple[str, ...]
    answer: int | None
    context: str = ""

    def __post_init__(self) -> None:
        count = len(self.options)
        if count < 2:
            raise Refusal(f"row {self.id}: got {count} options, expected at least two")
        if self.answer is not None and not 0 <= self.answer < count:
            raise Refusal(f"row {self.id}: the right answer is not among its {count} options")

    @property
    def content(self) -> tuple[str, ...]:
        """What makes two rows the same question, whatever their ids."""
        return (self.context, self.question, *self.options)
