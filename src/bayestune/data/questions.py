"""One row: a question with fixed options and the index of the right one."""

from dataclasses import dataclass
from typing import Literal

Scoring = Literal["letter", "text", "head"]
LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


@dataclass(frozen=True)
class Question:
    """One row: a question, its options, and the index of the right one (None where it is not known)."""

    id: str
    question: str
    options: tuple[str, ...]
    answer: int | None
    context: str = ""

    def __post_init__(self) -> None:
        if len(self.options) < 2:
            raise ValueError(
                f"row {self.id}: got {len(self.options)} options, expected at least two"
            )
        if self.answer is not None and not 0 <= self.answer < len(self.options):
            raise ValueError(
                f"row {self.id}: the right answer is not among its {len(self.options)} options"
            )

    @property
    def content(self) -> tuple[str, ...]:
        """What makes two rows the same question, whatever their ids."""
        return (self.context, self.question, *self.options)
