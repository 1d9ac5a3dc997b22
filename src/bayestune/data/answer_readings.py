"""Which option is right: answers are indices, letters or texts, by one rule for a whole file."""

import logging
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from bayestune.data.column_roles import is_missing
from bayestune.data.questions import LETTERS
from bayestune.errors import Refusal, nearest

logger = logging.getLogger(__name__)

AnswerIs = Literal["index", "letter", "text"]
READINGS = ("index", "letter", "text")
_WHOLE = re.compile(r"\d+(\.0*)?")
_WHOLE_FLOAT = re.compile(r"-?\d+\.0+")
_NUMERIC = re.compile(r"[-+]?\d+(\.\d*)?")
_LETTER = re.compile(r"[(\[]?([A-Za-z])[)\].:]*")
_TRUTH = {True: ("true", "yes"), False: ("false", "no")}
_ENOUGH_ROWS = 12  # four options: 3 % of files have no answer 0 by chance


@dataclass(frozen=True)
class Answered:
    """An answer as its file gives it, beside the options that it is one of."""

    place: str  # where the row stands, for messages
    answer: Any
    options: tuple[str, ...]
    labels: tuple[str, ...] = ()  # the options' own names, where the file gives some
    counted: int | None = None  # the first option column's number, where the columns have numbers


def right_options(
    rows: Sequence[Answered], answer_is: AnswerIs | None = None, usual: AnswerIs | None = None
) -> list[int]:
    """The index of each row's right option, by the one reading that fits all rows.

    Numbers are indices. Texts are options' texts, letters or indices, whichever all rows are. Where
    two readings fit, as of numbers that are classes' texts too, they must agree.

    Args:
        rows: those that have an answer; at least one.
        answer_is: the reading; None to find it.
        usual: the reading of files like this one, used if it fits all rows. It is used in any case
            if it is "text" and options are numbers, which could be taken for indices.

    Raises:
        Refusal: if no reading fits all rows, or two fit and differ.
    """
    if answer_is is None and usual is not None:
        of_numbers = usual == "text" and any(map(_is_numeric, rows))
        if of_numbers or all(_read(usual, row) is not None for row in rows):
            answer_is = usual
    readings = {}  # each row's index under a reading, None where it does not fit
    for name in _candidates(rows, answer_is):
        readings[name] = list(map(partial(_read, name), rows))
    fitting = {name: indices for name, indices in readings.items() if None not in indices}
    if not fitting:
        raise _refusal(rows, readings)
    name, indices = next(iter(fitting.items()))
    if answer_is is None and name == "index":
        fitting |= _also_texts(rows)
    for other, other_indices in fitting.items():
        _refuse_difference(rows, (name, indices), (other, other_indices))
    if name == "index" and answer_is is None:
        _check_count_from_0(rows, indices)
        _warn_of_truths(rows)
    return indices  # type: ignore[return-value]


def _also_texts(rows: Sequence[Answered]) -> dict[str, list[int | None]]:
    """The reading "text" of answers that were read as indices; empty if it does not fit all rows.

    It is empty too where options differ by row, as those of sums do: only the names of classes,
    such as stars from 1 to 5, are written as numbers and meant as texts.
    """
    if len(rows) < 2 or len({row.options for row in rows}) > 1:
        return {}
    texts = list(map(partial(_read, "text"), rows))
    return {} if None in texts else {"text": texts}


def is_readable(row: Answered) -> bool:
    """Whether a row has no answer, or its answer names an option under some reading."""
    names = ("label", *READINGS) if row.labels else READINGS
    return is_missing(row.answer) or any(_read(name, row) is not None for name in names)


def _candidates(rows: Sequence[Answered], answer_is: AnswerIs | None) -> tuple[str, ...]:
    """The readings to try, the first that fits being the one; refuses an unknown `answer_is`."""
    if answer_is is not None:
        if answer_is not in READINGS:
            raise Refusal(
                f"unknown answer_is: got {answer_is!r}, expected one of {READINGS}; correct it"
            )
        return (answer_is,)
    if any(row.labels for row in rows):
        return ("label", "text")
    if any(_is_number(row.answer) for row in rows):
        return ("index",)
    return ("text", "letter", "index")


def _is_numeric(row: Answered) -> bool:
    """Whether an option of the row is written as a number."""
    return any(_NUMERIC.fullmatch(option.strip()) for option in row.options)


def _is_number(answer: object) -> bool:
    return isinstance(answer, int | float) and not isinstance(answer, bool)


def _read(name: str, row: Answered) -> int | None:
    """The option that an answer names under a reading; None if it names none."""
    answer = row.answer
    if isinstance(answer, list | dict):
        return None
    if name == "text":
        return _of_text(answer, row.options)
    if isinstance(answer, bool):
        return None
    written = str(answer).strip()
    if name == "label":
        return row.labels.index(written) if written in row.labels else None
    if name == "letter":
        match = _LETTER.fullmatch(written)
        index = LETTERS.index(match[1].upper()) if match else -1
    else:
        index = int(float(written)) if _WHOLE.fullmatch(written) else -1
    return index if 0 <= index < len(row.options) else None


def _of_text(answer: Any, options: tuple[str, ...]) -> int | None:
    """The option of that text; None if there is none.

    Where one option alone can be meant, case does not matter, and true counts as yes, false as no.

    >>> _of_text("Yes", ("no", "yes")), _of_text("2.0", ("1", "2"))
    (1, 1)
    """
    if str(answer).strip() not in options:
        answer = whole_number(answer)
    texts = _TRUTH[answer] if isinstance(answer, bool) else (str(answer).strip(),)
    if texts[0] in options:
        return options.index(texts[0])
    folded_options = [folded(option) for option in options]
    if isinstance(answer, str) and folded(answer) in ("true", "false"):
        texts = _TRUTH[folded(answer) == "true"]
    for text in texts:
        if folded_options.count(folded(text)) == 1:
            return folded_options.index(folded(text))
    return None


def whole_number(answer: Any) -> Any:
    """A whole number without its ".0"; any other answer as it is.

    Tables turn a column of whole numbers into floats if a value is missing.
    """
    if isinstance(answer, float) and answer.is_integer():
        return int(answer)
    if isinstance(answer, str) and _WHOLE_FLOAT.fullmatch(answer.strip()):
        return answer.strip().partition(".")[0]
    return answer


def folded(text: str) -> str:
    """A text without outer spaces, in one case and one Unicode form, for comparison."""
    return unicodedata.normalize("NFC", text.strip()).casefold()


def _refuse_difference(
    rows: Sequence[Answered],
    first: tuple[str, Sequence[int | None]],
    second: tuple[str, Sequence[int | None]],
) -> None:
    """Refuses rows of which some answer names one option under one reading and another under two.

    Args:
        rows: N rows.
        first: a reading's name, and its N indices.
        second: likewise.
    """
    first_name, first_indices = first
    second_name, second_indices = second
    for row, index, other in zip(rows, first_indices, second_indices, strict=True):
        if index is not None and other is not None and index != other:
            got = f"{row.options[index]!r} as its {first_name}"
            got = f"{got}, {row.options[other]!r} as its {second_name}"
            raise Refusal(
                f"row {row.place}: the answer {row.answer!r} can be read in two ways: got {got}, "
                f"expected one reading of the whole file; give answer_is, one of {READINGS}"
            )


def _check_count_from_0(rows: Sequence[Answered], indices: Sequence[int | None]) -> None:
    """Refuses or warns of indices that may count from 1: none is 0.

    It refuses them if the options' columns count from 1.
    """
    if 0 in indices:
        return
    row = rows[0]
    if row.counted == 1:
        raise Refusal(
            f"row {row.place}: the answer {row.answer!r} can be read in two ways: got option "
            f"columns that count from 1 and no answer 0, expected indices, which count from 0; "
            "give letters or texts, or answer_is='index' if they count from 0"
        )
    if len(rows) >= _ENOUGH_ROWS and len(row.options) > 2:
        logger.warning("no row's answer is 0: indices count from 0, perhaps the file's from 1")


def _warn_of_truths(rows: Sequence[Answered]) -> None:
    """Warns that index 1 is a no, if the options are a yes and a no in this order."""
    for row in rows:
        yes, no = map(folded, row.options[:2])
        if len(row.options) == 2 and yes in _TRUTH[True] and no in _TRUTH[False]:
            first, second = row.options
            warning = (
                "row %s: answers are indices: 0 is %r and 1 is %r; if 1 means %r, put %r first"
            )
            logger.warning(warning, row.place, first, second, first, second)
            return


def _refusal(rows: Sequence[Answered], readings: dict[str, list[int | None]]) -> Refusal:
    """Why no reading fits: the first row that does not, under the reading that fits most rows."""
    name = max(readings, key=lambda name: len(rows) - readings[name].count(None))
    indices = readings[name]
    row = rows[indices.index(None)]
    options = list(row.options)
    got = f"row {row.place}: the right answer {row.answer!r} is not among its options {options}"
    names = dict.fromkeys([*READINGS, *readings])
    others = [other for other in names if other != name and _read(other, row) is not None]
    examples = (row for row, index in zip(rows, indices, strict=True) if index is not None)
    return Refusal(f"{got}; {_hint(row, name, others, next(examples, None))}")


def _hint(row: Answered, name: str, others: Sequence[str], fitting: Answered | None) -> str:
    """What to do about a row that a reading does not fit.

    Args:
        row: the row.
        name: of the reading.
        others: the readings that fit the row.
        fitting: a row that the reading fits, if there is one.
    """
    if isinstance(row.answer, list | dict):
        return "expected one answer, not several; give one row for each, or one answer"
    if others and fitting is not None:
        example = f"{fitting.answer!r} in row {fitting.place}"
        return (
            f"it is read as the {name}, as {example}, and would be one as the {others[0]}: "
            "expected one kind of answer in the whole file; write all in the same way"
        )
    if others:
        return f"it is read as the {name}; if it is the {others[0]}, give answer_is={others[0]!r}"
    alike = nearest(str(row.answer), row.options)
    if alike:
        return f"did you mean {alike!r}?"
    if str(row.answer).strip().startswith("-"):
        return "leave the answer empty where it is not known"
    if _is_number(row.answer) or str(row.answer).strip().isdecimal():
        return f"expected an index from 0 to {len(row.options) - 1}; indices count from 0"
    return "expected an option's text, its letter, or its index from 0"
