"""One row: a question with fixed options and the index of the right one."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, SupportsIndex

from bayestune.data.digests import digest
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
        turns: the messages before it, a role and a text each, where the question is the last
            message of a conversation.
    """

    id: str
    question: str
    options: tuple[str, ...]
    answer: int | None
    context: str = ""
    turns: tuple[tuple[str, str], ...] = field(default=(), metadata={"absent_means": ()})

    def __post_init__(self) -> None:
        for name in ("question", "context"):
            text = getattr(self, name)
            if not isinstance(text, str) or (name == "question" and not text.strip()):
                raise Refusal(f"row {self.id}: got the {name} {text!r}, expected a text; fill it")
        self._check_options()
        if self.answer is not None:
            self._check_answer(self.answer)

    def _check_options(self) -> None:
        options = self.options
        texts = [option for option in options if isinstance(option, str) and option.strip()]
        if isinstance(options, str) or len(texts) < len(options):
            raise Refusal(
                f"row {self.id}: got the options {options!r}, expected texts, none of them empty; "
                "make each a text of its own"
            )
        if len(options) < 2:
            raise Refusal(f"row {self.id}: got {len(options)} options, expected at least two")

    def _check_answer(self, answer: int) -> None:
        if isinstance(answer, bool) or not isinstance(answer, SupportsIndex):
            raise Refusal(
                f"row {self.id}: got the answer {answer!r}, expected an index from 0; count the "
                "options before it"
            )
        options = self.options
        if not 0 <= answer < len(options):
            raise Refusal(
                f"row {self.id}: the right answer is not among its {len(options)} options"
            )
        if options.count(options[answer]) > 1:
            raise Refusal(
                f"row {self.id}: got the right answer twice among the options {list(options)}, "
                "expected it once; drop one"
            )

    @property
    def content(self) -> tuple[str, ...]:
        """The row's texts: two rows with the same ones are the same question, whatever their ids.

        The order of the options counts; to `fingerprint` it does not matter.
        """
        earlier = [f"{role}: {text}" for role, text in self.turns]
        return (*earlier, self.context, self.question, *self.options)

    @property
    def fingerprint(self) -> str:
        """A short hash of the texts and the set of options, by which later commands know a row."""
        texts: tuple[object, ...] = (self.context, self.question, sorted(self.options))
        if self.turns:  # hashes of rows without turns stay as they were before there were any
            texts = (*texts, self.turns)
        return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]

    def with_options(self, options: tuple[str, ...]) -> "Question":
        """The question with its options in another order, and the answer's index with them.

        Raises:
            Refusal: if they are not the same options.
        """
        if set(self.options) != set(options) or len(self.options) != len(options):
            raise Refusal(
                f"row {self.id}: got the options {list(self.options)}, expected the classes "
                f"{list(options)} in any order; correct the row's options"
            )
        if self.options == options:
            return self
        answer = None if self.answer is None else options.index(self.options[self.answer])
        return replace(self, options=options, answer=answer)


def rows_digest(rows: Sequence[Question]) -> str:
    """How many rows there are, and a short hash of what they ask and answer, whatever their ids."""
    return f"{len(rows)} rows, {digest([(row.content, row.answer) for row in rows])[:10]}"
