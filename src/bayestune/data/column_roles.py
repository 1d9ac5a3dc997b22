"""What the columns of a file stand for: the known names of roles, and what happens to others."""

import logging
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bayestune.errors import Refusal, nearest
from bayestune.whole_files import JsonRow

logger = logging.getLogger(__name__)

ROLES = {
    "question": (
        *("question", "text", "sentence", "question_stem"),
        *("query", "prompt", "hypothesis", "sentence2"),
    ),
    "context": (
        *("context", "passage", "article", "paragraph"),
        *("support", "premise", "sentence1"),
    ),
    "messages": ("messages",),
    "options": ("options", "choices"),
    "answer": ("answer", "label", "answerkey", "answer_key", "correct_answer"),
    "id": ("id",),
}
# names that say their role; that another name was read as one is logged
_PLAIN = {"question", "text", "context", "passage", "options", "choices", "answer", "label", "id"}
_PLAIN |= {"messages"}
_NOT_MEANT = {"id", "messages"}  # never suggested for a misspelt name: too many names are near
_ROLE = {name: role for role, names in ROLES.items() for name in names}
# columns that programs add, such as pandas' index; nobody is told that they are not used
_UNSAID = re.compile(r"|unnamed:_\d+|index|idx|__index_level_0__|level_0")
# columns of one option each, such as option_a, choice1 or b
_LETTERED = re.compile(r"(option|choice|opt|op|answer|ending|sol|)_?([a-z]|\d{1,2})")
_LAST_BARE = "j"  # the last letter that names an option's column by itself
# how programs write a value that is missing, where a text is expected
MISSING_WORDS = frozenset(("nan", "NaN", "NAN", "null", "NULL", "None", "<NA>", "NaT", "#N/A"))


def known_names() -> Collection[str]:
    """The plain names of columns that have a role, without those of single options."""
    return _ROLE.keys()


def checked_columns(columns: Mapping[str, str]) -> dict[str, str]:
    """A copy of the user's names of columns by role, such as {"question": "subject"}.

    Raises:
        Refusal: if a role is unknown, a name is empty, or one column has two roles.
    """
    for role, column in columns.items():
        if role not in ROLES:
            alike = nearest(role, ROLES)
            hint = f"did you mean {alike!r}?" if alike else "choose one"
            raise Refusal(f"columns: got {role!r}, expected among {list(ROLES)}; {hint}")
        if not isinstance(column, str) or not column.strip():
            got = f"columns: got {column!r} for the {role}, expected a column's name"
            raise Refusal(f"{got}; correct it")
    names = [plain_name(column) for column in columns.values()]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise Refusal(f"columns: got {twice} for two roles, expected one each; drop one")
    return dict(columns)


def plain_name(column: str) -> str:
    """A column's name in small letters, without outer spaces, its words joined by "_"."""
    return re.sub(r"[\s-]+", "_", column.strip().lstrip("\ufeff").casefold())


def is_missing(value: object) -> bool:
    """Whether a cell holds nothing: null, NaN, or no more than spaces."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and not value.strip())


def as_text(value: object, what: str, place: str) -> str:
    """A cell as text; "" if it holds nothing, or a word that programs write for a missing value.

    Args:
        value: the cell.
        what: it is, for messages.
        place: where its row stands, for messages.

    Raises:
        Refusal: if it is a list, an object or a truth value.
    """
    if is_missing(value) or (isinstance(value, str) and value.strip() in MISSING_WORDS):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # a whole number beside missing ones
    if isinstance(value, bool | list | dict):
        raise Refusal(
            f"row {place}: got {what} {value!r}, expected a text; one object for each row (pandas: "
            'to_json(orient="records", lines=True))'
        )
    return _whole(str(value), what, place)


def as_option(value: object, place: str) -> str:
    """One of a row's options as text, as it is written.

    Raises:
        Refusal: if it holds nothing, or is a list or an object.
    """
    if is_missing(value) or isinstance(value, list | dict):
        raise Refusal(f"{place}: got the option {value!r}, expected a text; fill it or drop it")
    return _whole(str(value).strip(), "the option", place)


def _whole(text: str, what: str, place: str) -> str:
    """The text; refuses half of a surrogate pair, which UTF-8 cannot hold."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise Refusal(
            f"row {place}: got {what} {text!r} with half a character, expected Unicode; mend it "
            "where it was cut"
        )
    return text


@dataclass(frozen=True)
class Fields:
    """The cells of a row by what they stand for; None where there is none."""

    question: Any = None
    context: Any = None
    messages: Any = None
    options: Any = None
    answer: Any = None
    id: Any = None
    counted: int | None = None  # number of the first option's column, as 1 of option_1


class Columns:
    """What the columns of a file stand for, one meaning for all of its rows.

    `text` is the question, or beside `question` the context. Columns that are not used are named
    in one warning; one that looks like the misspelt name of a column that a row lacks is refused.

    Args:
        name: of the file.
        rows: all of them.
        given: names of columns by role, as the user gives them; no other column has these roles.
    """

    def __init__(
        self, name: str, rows: Sequence[JsonRow], given: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self._given = {plain_name(column): role for role, column in (given or {}).items()}
        plain = [_filled(row) for row in rows]
        self._text_is_context = any({"question", "text"} <= cells.keys() for cells in plain)
        self._unused: dict[str, None] = {}  # names in the order in which they were met
        self._read_as: dict[str, str] = {}  # names that do not say their role, and that role

    def fields(self, row: JsonRow, place: str) -> Fields:
        """The cells of a row by what they stand for.

        Raises:
            Refusal: if two columns stand for the same, or one looks misspelt.
        """
        names = [plain_name(str(column)) for column in row]
        if twice := sorted({name for name in names if name and names.count(name) > 1}):
            raise Refusal(f"row {place}: got the columns {twice} twice, but for case; rename one")
        cells = _filled(row)
        name_of: dict[str, str] = {}  # by role
        for name in cells:
            role = self._role(name)
            if role in name_of:
                raise Refusal(
                    f"row {place}: got the columns {name_of[role]!r} and {name!r}, expected one of "
                    f"them for the {role}; rename or drop the other"
                )
            if role:
                name_of[role] = name
        values = {role: cells[name] for role, name in name_of.items()}
        lettered: list[str] = []
        if "options" not in name_of and "options" not in self._given.values():
            lettered = _lettered(cells.keys() - set(name_of.values()))
        counted = None
        if lettered:
            values["options"] = _options_of(lettered, row, place)
            counted = _counted(lettered[0])
        self._note(names, name_of, lettered, place)
        return Fields(**values, counted=counted)

    def _role(self, name: str) -> str | None:
        """What a column of this plain name stands for; None if for nothing."""
        if name in self._given:
            return self._given[name]
        role = "context" if name == "text" and self._text_is_context else _ROLE.get(name)
        return None if role in self._given.values() else role

    def _note(
        self, names: Sequence[str], name_of: dict[str, str], lettered: Sequence[str], place: str
    ) -> None:
        """Notes the columns for `say`; refuses one that looks like a name that the row lacks.

        Args:
            names: of all columns of the row, empty cells among them.
            name_of: the names that were used, by role.
            lettered: the names of the options' columns that were used.
            place: where the row stands, for messages.
        """
        for role, name in name_of.items():
            is_odd = name not in _PLAIN or (name == "text" and role == "context")
            if is_odd and name not in self._given:
                self._read_as[name] = role
        for name in names:
            is_used = name in name_of.values() or self._role(name) is not None
            # a letter that was not used is an option that this row does not have
            is_option = lettered and _marked(name) is not None
            if is_used or is_option or _UNSAID.fullmatch(name):
                continue
            if name not in _ROLE:  # else another column has its role
                self._refuse_slip(name, names, name_of, place)
            self._unused[name] = None

    def _refuse_slip(
        self, name: str, names: Sequence[str], roles: Collection[str], place: str
    ) -> None:
        """Refuses a name that looks like that of a role that the row lacks; `roles` it has."""
        meant = nearest(name, [known for known in _ROLE if known not in _NOT_MEANT], cutoff=0.8)
        if meant is None:
            return
        if (self._role(meant) or _ROLE[meant]) not in {*roles, *self._given.values()}:
            lacking = " or ".join(map(repr, ROLES[_ROLE[meant]][:2]))
            raise Refusal(
                f"row {place}: no column {lacking}; got the columns {sorted(names)}; did you "
                f"mean {meant!r} by {name!r}? rename or drop it"
            )

    def say(self) -> None:
        """Logs the columns whose names do not say their role, and those that were not used."""
        for name, role in self._read_as.items():
            logger.info("%s: the column %r is read as the %s", self.name, name, role)
        if self._unused:
            logger.warning("%s: columns not used: %s", self.name, ", ".join(self._unused))


def _filled(row: JsonRow) -> JsonRow:
    """The cells that hold something, by plain names."""
    return {plain_name(str(name)): cell for name, cell in row.items() if not is_missing(cell)}


def _lettered(names: Collection[str]) -> list[str]:
    """The names of the options' columns, in order, such as option_a, option_b or A, B, C.

    Of several kinds it is the one with the most columns; a kind counts if it has two or more and
    begins with a, 0 or 1. Gaps are refused later.
    """
    kinds: dict[str, dict[int, str]] = {}
    for name in names:
        if marked := _marked(name):
            kind, number = marked
            kinds.setdefault(kind, {})[number] = name
    runs = []
    for kind, by_number in kinds.items():
        first = 1 if kind.endswith("1") else 0  # numbers may begin at 1
        if len(by_number) > 1 and min(by_number) <= first:
            runs.append([by_number[number] for number in sorted(by_number)])
    return max(runs, key=len, default=[])


def _marked(name: str) -> tuple[str, int] | None:
    """The kind of an option's column and its place there; None of other columns.

    >>> _marked("option_c"), _marked("choice10"), _marked("k")
    (('option a', 2), ('choice 1', 10), None)
    """
    match = _LETTERED.fullmatch(name)
    if match is None:
        return None
    stem, mark = match.groups()
    if not stem and (mark.isdigit() or mark > _LAST_BARE):
        return None
    return (f"{stem} 1", int(mark)) if mark.isdigit() else (f"{stem} a", ord(mark) - ord("a"))


def _counted(name: str) -> int | None:
    """The number of an option's column; None if it has a letter."""
    kind, number = _marked(name) or ("", 0)
    return number if kind.endswith("1") else None


def _options_of(names: Sequence[str], row: JsonRow, place: str) -> list[Any]:
    """The options in the columns of these names; refuses an empty column between two of them."""
    numbers = [marked[1] for marked in map(_marked, names) if marked]
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise Refusal(
            f"row {place}: got options in the columns {list(names)}, expected no empty one between "
            "them; fill it, or move the others up"
        )
    return [_filled(row)[name] for name in names]
