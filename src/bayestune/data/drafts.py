"""A row whose right option is not known yet: its texts, and its answer as the file gives it.

Which option an answer means is known when all rows of the file are read: see `answer_readings`.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bayestune.data.answer_readings import Answered
from bayestune.data.column_roles import Fields, as_text, is_missing
from bayestune.data.conversations import Turns
from bayestune.data.file_kinds import GivenRow
from bayestune.data.option_lists import checked_options, option_list
from bayestune.errors import Refusal


@dataclass(frozen=True)
class Draft:
    """A row whose right option is not known yet."""

    question: str
    context: str
    answered: Answered
    turns: Turns = ()


def draft_of(row: GivenRow, field: Fields, options: Sequence[str], advice: str) -> Draft:
    """A row's texts, its options, and its answer as it is given.

    Args:
        row: as the file gives it.
        field: its cells by what they stand for.
        options: of rows that have none of their own.
        advice: what a refusal adds if there are no options at all.

    Raises:
        Refusal: if the row has no question or no options, or a text or an option is not one.
    """
    question = _question_text(row, field)
    labels: tuple[str, ...] = ()
    row_options = tuple(options)
    if field.options is not None:
        texts, labels = option_list(field.options, row.place)
        row_options = checked_options(texts, f"row {row.place}")
    elif not row_options:
        raise Refusal(
            f"row {row.place}: no options; give a column 'options' or the same options for all "
            f"rows{advice}"
        )
    answered = Answered(row.place, field.answer, row_options, labels, field.counted)
    context = as_text(field.context, "the context", row.place)
    return Draft(question, context, answered, field.messages)


def possible_options(fields: Iterable[Fields]) -> str:
    """Advice that offers the answers of a file as its options; "" where they cannot be options."""
    words = sorted({str(f.answer).strip() for f in fields if isinstance(f.answer, str)})
    return f", such as {json.dumps(words, ensure_ascii=False)}" if 1 < len(words) <= 26 else ""


def _question_text(row: GivenRow, field: Fields) -> str:
    """The text of a row's question; refuses a row without one."""
    text = as_text(field.question, "the question", row.place)
    if not text and is_missing(field.question):
        got = sorted(map(str, row.cells))
        raise Refusal(
            f"row {row.place}: no column 'question' or 'text'; got the columns {got}, expected a "
            "text in one of these; name and fill it"
        )
    if not text:
        raise Refusal(
            f"row {row.place}: got the question {field.question!r}, which is how a missing value "
            "is written, expected a text; fill it or drop the row"
        )
    return text
