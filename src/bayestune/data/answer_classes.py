"""Classes read from the answers: if no row has options, the different answers are the options."""

import logging
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from bayestune.data.answer_readings import AnswerIs, folded, whole_number
from bayestune.data.column_roles import MISSING_WORDS, Fields, as_option, is_missing
from bayestune.errors import Refusal

logger = logging.getLogger(__name__)

_FEW = 26  # classes that letters can name; of more, most must have several rows
_SHOWN = 10
_NUMBER = re.compile(r"-?\d+(\.\d+)?")


def with_classes(
    rows: Mapping[int, Fields], name: str, answer_is: AnswerIs | None
) -> tuple[dict[int, Fields], tuple[str, ...]]:
    """The rows with their answers as texts, and the classes: the different answers in order.

    Args:
        rows: of a file by number, none of which has options.
        name: of the file.
        answer_is: what the user says that answers are.

    Returns:
        The rows, and the classes; no classes if no row has an answer.

    Raises:
        Refusal: if the user says that answers are indices or letters, if all are the same, one
            class has several spellings, or there are too many different ones to be classes.
    """
    if answer_is not in (None, "text"):
        raise Refusal(
            f"{name}: got answers that are the {answer_is} of an option each, and no options; "
            "expected these; give options, or answer_is='text' for the answers as classes"
        )
    as_texts = {number: _with_text_answer(row, name, number) for number, row in rows.items()}
    counts = Counter(row.answer for row in as_texts.values() if not is_missing(row.answer))
    if not counts:
        return as_texts, ()
    if len(counts) < 2:
        raise Refusal(
            f"{name}: no row has options, and all have the same answer {next(iter(counts))!r}; "
            "expected two or more classes; give the others as options"
        )
    _refuse_spellings(counts, name)
    for word in sorted(MISSING_WORDS & counts.keys()):
        warning = "%s: %d rows have the answer %r, which is how a missing value is written: a class"
        logger.warning(warning, name, counts[word], word)
    if len(counts) > max(_FEW, counts.total() // 2):
        raise Refusal(
            f"{name}: no row has options, and {counts.total()} rows have {len(counts)} different "
            "answers; expected classes, which several rows share; name another column for the "
            "answer, or give options"
        )
    classes = tuple(sorted(counts, key=_sort_key))
    shown = [f"{text!r} ({counts[text]})" for text in classes[:_SHOWN]]
    more = f" and {len(classes) - _SHOWN} more" if len(classes) > _SHOWN else ""
    logger.info("%s: the options are its answers: %s%s", name, ", ".join(shown), more)
    return as_texts, classes


def _refuse_spellings(counts: Counter[str], name: str) -> None:
    """Refuses answers that are one class in several spellings, which would be as many classes."""
    spellings: dict[str, list[str]] = {}
    for text in sorted(counts, key=counts.__getitem__, reverse=True):
        spelling = " ".join(folded(whole_number(text)).split())
        spellings.setdefault(spelling, []).append(text)
    for texts in spellings.values():
        if len(texts) > 1:
            got = ", ".join(f"{text!r} ({counts[text]} rows)" for text in texts)
            others = [each[0] for each in spellings.values()][:_SHOWN]
            raise Refusal(
                f"{name}: no row has options, and answers differ in case, spaces or a .0 alone: "
                f"got {got}, expected one spelling of each class; write it alike, or give the "
                f"classes as options, such as {others}"
            )


def _with_text_answer(row: Fields, name: str, number: int) -> Fields:
    """The row with its answer, if it has one, as text."""
    if is_missing(row.answer):
        return row
    answer = row.answer
    if isinstance(answer, float):
        answer = whole_number(answer)
    return replace(row, answer=as_option(answer, f"row {name}:{number + 1}"))


def _sort_key(text: str) -> tuple[bool, float, str]:
    """Sorts numbers by their value, then other texts by their letters."""
    is_number = bool(_NUMBER.fullmatch(text))
    return not is_number, float(text) if is_number else 0.0, text
