"""A question with fixed options, how it becomes a prompt, and reading the user's own files."""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
            raise ValueError(f"row {self.id}: got {len(self.options)} options, expected at least two")
        if self.answer is not None and not 0 <= self.answer < len(self.options):
            raise ValueError(f"row {self.id}: the right answer is not among its {len(self.options)} options")

    @property
    def content(self) -> tuple[str, ...]:
        """What makes two rows the same question, whatever their ids."""
        return (self.context, self.question, *self.options)


@dataclass(frozen=True)
class Prompt:
    """How a question becomes text.

    Args:
        letter: template under letter scoring, with {context}, {question} and {choices}, lines such as "A) text"; or
            with {texts_first}, lines such as "text) A". It ends where the label comes.
        text: template under text scoring, with {context} and {question}; it ends where the option's text comes.
        labels: what stands for the options under letter scoring.
    """

    letter: str
    text: str
    labels: tuple[str, ...] = LETTERS

    def render(self, row: Question, scoring: Scoring) -> str:
        """The prompt of a row, up to the place of its answer."""
        pairs = list(zip(self.labels, row.options, strict=False))
        lines = {
            "choices": "\n".join(f"{label}) {option}" for label, option in pairs),
            "texts_first": "\n".join(f"{option}) {label}" for label, option in pairs),
        }
        template = self.letter if scoring == "letter" else self.text
        return template.format(context=row.context, question=row.question, **lines)

    def answers(self, row: Question, scoring: Scoring) -> tuple[str, ...]:
        """What continues the prompt for each option.

        Raises:
            ValueError: if a row has more options than there are labels.
        """
        if scoring == "text":
            return row.options
        if len(row.options) > len(self.labels):
            raise ValueError(
                f"row {row.id}: got {len(row.options)} options, expected at most {len(self.labels)} under letter "
                'scoring; use scoring="text"'
            )
        return self.labels[: len(row.options)]


CHOICES = Prompt(
    letter="Return the label of the correct answer for the question below.\n\n"
    "Question: {question}\nChoices:\n{choices}\nAnswer:",
    text="Question: {question}\nAnswer:",
)
PASSAGE_CHOICES = Prompt(
    letter="Return the label of the correct answer for the question below.\n\n"
    "Passage: {context}\nQuestion: {question}\nChoices:\n{choices}\nAnswer:",
    text="Passage: {context}\nQuestion: {question}\nAnswer:",
)
BLANK = Prompt(letter=CHOICES.letter, text="Fill in the blank: {question}\nAnswer:")
_BOOLQ = (
    "Read the passage below and answer the question with the words 'true' or 'false'.\n\n"
    "Passage: {context}\nQuestion: {question}\nAnswer (true or false):"
)
_LABELLED = "Return the label of the correct answer for the question below.\n\n{text}\nChoices:\n{{choices}}\nAnswer:"


def _sentences(text: str) -> Prompt:
    return Prompt(letter=_LABELLED.format(text=text), text=text + "\nAnswer:")


ENTAILMENT = _sentences("Passage: {context}\nStatement: {question}\nDoes the passage entail the statement?")
PARAPHRASE = _sentences("First: {context}\nSecond: {question}\nDo the two sentences mean the same?")
ACCEPTABLE = _sentences("Sentence: {question}\nIs the sentence acceptable English?")
TRUE_FALSE = Prompt(letter=_BOOLQ, text=_BOOLQ, labels=("True", "False"))

# The prompts as the public code of BLoB's authors prints them, to compare results with: the texts stand where the
# letters belong, a word is misspelt, and BoolQ's labels are interchanged. See docs/fidelity.md.
_TEXTS_FIRST = CHOICES.letter.replace("{choices}", "{texts_first}")
AUTHORS_ARC = Prompt(letter=_TEXTS_FIRST, text=CHOICES.text)
AUTHORS_OPENBOOK = Prompt(letter=_TEXTS_FIRST.replace("Choices:", "Chioces:"), text=CHOICES.text)
AUTHORS_BOOLQ = Prompt(letter=_BOOLQ, text=_BOOLQ, labels=("False", "True"))

Record = dict[str, Any]


def json_lines(path: Path) -> Iterator[Record]:
    """The objects of a file with one JSON object a line; a line that is none is named."""
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path.name}, line {number}: not a JSON object ({error})") from None
                if not isinstance(row, dict):
                    raise ValueError(f"{path.name}, line {number}: not a JSON object (got a {type(row).__name__})")
                yield row


def load_rows(path: Path, options: Sequence[str] = (), *, labelled: bool = True) -> tuple[Question, ...]:
    """The user's own questions, from a JSONL or CSV file.

    Columns: `question` (or `text`); `options` or `choices` for the row, a list (in CSV a JSON list or texts joined
    by "|"), unless `options` are given for all rows; `answer`, an index from 0, a letter or an option's text;
    and, if there, `id` and `context`.

    Args:
        path: the file, `.jsonl`, `.json` (one object a line) or `.csv`.
        options: the options of every row that has none of its own.
        labelled: whether every row must have an answer.

    Raises:
        ValueError: if the file is empty, a column is missing, or a row's answer is not among its options.
        FileNotFoundError: if there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as lines:
            records: list[Record] = list(csv.DictReader(lines))
    else:
        records = list(json_lines(path))
    if not records:
        raise ValueError(f"{path.name} is empty: expected at least one row")
    return tuple(own_question(row, f"{path.name}:{i}", options, labelled=labelled) for i, row in enumerate(records, 1))


def own_question(row: Record, key: str, options: Sequence[str] = (), *, labelled: bool = True) -> Question:
    """One row of the user's own data, see `load_rows`."""
    text = row.get("question") or row.get("text")
    if not text:
        raise ValueError(f"row {key}: no column 'question' or 'text'; got the columns {sorted(map(str, row))}")
    own = _own_options(row.get("options") or row.get("choices") or list(options), key)
    answer = _answer_index(row.get("answer"), own, key) if labelled or row.get("answer") not in (None, "") else None
    name = key if row.get("id") in (None, "") else str(row["id"])
    return Question(name, str(text), own, answer, str(row.get("context") or ""))


def _own_options(own: object, key: str) -> tuple[str, ...]:
    if not own:
        raise ValueError(f"row {key}: no options; give a column 'options' or the same options for all rows")
    if isinstance(own, str):
        try:
            own = json.loads(own) if own.lstrip().startswith("[") else own.split("|")
        except json.JSONDecodeError as error:
            raise ValueError(f"row {key}: got options {own!r}, which is no JSON list ({error})") from None
    if not isinstance(own, list):
        raise ValueError(f"row {key}: got options {own!r}, expected a list of texts")
    return tuple(str(option).strip() for option in own)


def _answer_index(answer: object, options: tuple[str, ...], key: str) -> int:
    if answer is None or answer == "":
        raise ValueError(f"row {key}: no column 'answer'")
    text = str(answer).strip()
    if text in options:
        return options.index(text)
    if text.isdecimal() and int(text) < len(options):
        return int(text)
    if text in LETTERS[: len(options)]:
        return LETTERS.index(text)
    raise ValueError(f"row {key}: the right answer {answer!r} is not among its options {list(options)}")
