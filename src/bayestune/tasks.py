"""Questions with fixed options: the table of public tasks, the user's own files, and the prompts."""

import csv
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

Scoring = Literal["letter", "text"]
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


@dataclass(frozen=True)
class Prompt:
    """How a question becomes text.

    Args:
        letter: template under letter scoring, with {context}, {question} and {choices}; it ends where the label comes.
        text: template under text scoring, with {context} and {question}; it ends where the option's text comes.
        labels: what stands for the options under letter scoring.
    """

    letter: str
    text: str
    labels: tuple[str, ...] = LETTERS

    def render(self, row: Question, scoring: Scoring) -> str:
        """The prompt of a row, up to the place of its answer."""
        choices = "\n".join(f"{label}) {option}" for label, option in zip(self.labels, row.options, strict=False))
        template = self.letter if scoring == "letter" else self.text
        return template.format(context=row.context, question=row.question, choices=choices)

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
TRUE_FALSE = Prompt(letter=_BOOLQ, text=_BOOLQ, labels=("True", "False"))

Record = dict[str, Any]
Parse = Callable[[Record, str], Question]


def _ai2(row: Record, key: str) -> Question:
    labels, stem = row["choices"]["label"], row.get("question") or row["question_stem"]
    answer = labels.index(row["answerKey"]) if row["answerKey"] in labels else -1
    return Question(row.get("id", key), stem, tuple(row["choices"]["text"]), answer)


def _winogrande(row: Record, key: str) -> Question:
    answer = int(row["answer"]) - 1 if row["answer"] else None
    return Question(key, row["sentence"], (row["option1"], row["option2"]), answer)


def _boolq(row: Record, key: str) -> Question:
    question = row["question"].strip().rstrip("?") + "?"
    return Question(key, question, ("True", "False"), 0 if row["answer"] else 1, row["passage"])


def _plain(row: Record, key: str) -> Question:
    return Question(
        str(row.get("id", key)), row["question"], tuple(row.get("options") or row["choices"]), row["answer"]
    )


@dataclass(frozen=True)
class Source:
    """A public task: where its rows are and how they are read."""

    hub_id: str
    config: str
    parse: Parse
    prompt: Prompt = CHOICES
    train: str | None = "train"
    evaluation: str = "validation"


TASKS: dict[str, Source] = {
    "winogrande_s": Source("allenai/winogrande", "winogrande_s", _winogrande, BLANK),
    "winogrande_m": Source("allenai/winogrande", "winogrande_m", _winogrande, BLANK),
    "arc_challenge": Source("allenai/ai2_arc", "ARC-Challenge", _ai2),
    "arc_easy": Source("allenai/ai2_arc", "ARC-Easy", _ai2),
    "openbookqa": Source("allenai/openbookqa", "main", _ai2),
    "boolq": Source("google/boolq", "default", _boolq, TRUE_FALSE),
    "mmlu_chemistry": Source("cais/mmlu", "college_chemistry", _plain, train=None, evaluation="test"),
    "mmlu_physics": Source("cais/mmlu", "college_physics", _plain, train=None, evaluation="test"),
    "everyday": Source("everyday", "default", _plain, evaluation="test"),
}


@dataclass(frozen=True)
class Task:
    """Rows to train on, rows to evaluate on, and how to ask.

    Args:
        name: of the task.
        train: rows that a fit may see.
        evaluation: rows that nothing is fitted or chosen on.
        held_out: rows taken from train, for choosing anything.
        prompt: the templates.
    """

    name: str
    train: tuple[Question, ...]
    evaluation: tuple[Question, ...]
    held_out: tuple[Question, ...] = ()
    prompt: Prompt = CHOICES

    def subset(
        self, train: int | None = None, evaluation: int | None = None, holdout: float = 0.0, seed: int = 0
    ) -> "Task":
        """The task with a seeded part of train held out, then at most so many rows of each part.

        Args:
            train: rows to keep of what is left of train; None keeps all.
            evaluation: rows to keep of evaluation; None keeps all.
            holdout: the part of train held out, in [0, 1).
            seed: of the choice.

        Raises:
            ValueError: if `holdout` is out of range or leaves a part empty, or a number of rows is negative.
        """
        if not 0 <= holdout < 1:
            raise ValueError(f"holdout must lie in [0, 1): got {holdout}")
        if min(train or 0, evaluation or 0) < 0:
            raise ValueError(f"rows to keep must not be negative: got train={train}, evaluation={evaluation}")
        rows = list(self.train)
        random.Random(seed).shuffle(rows)
        count = round(holdout * len(rows))
        if holdout and not 0 < count < len(rows):
            raise ValueError(f"holdout={holdout} of {len(rows)} training rows leaves a part empty; change it")
        test = list(self.evaluation)
        if evaluation is not None and evaluation < len(test):
            test = random.Random(seed).sample(test, evaluation)
        return replace(self, train=tuple(rows[count:][:train]), held_out=tuple(rows[:count]), evaluation=tuple(test))


def load_task(name: str, data_root: Path | None = None) -> Task:
    """A task of the table, from the Hub or from a directory of the Hub's layout.

    Args:
        name: a key of `TASKS`.
        data_root: a directory with `<hub id>/<config>/<split>.jsonl`; None for the Hub. The task "everyday" is part
            of the package and needs neither.

    Returns:
        The task; `train` is empty where the table names no training split.

    Raises:
        ValueError: if the name is not in the table, or a row cannot be read.
        FileNotFoundError: if the directory lacks a file.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task: got {name!r}, expected one of {sorted(TASKS)} or a file of your own (--data)")
    source = TASKS[name]
    if source.hub_id == "everyday" and data_root is None:
        data_root = Path(str(resources.files("bayestune"))) / "data"

    def rows(split: str | None) -> tuple[Question, ...]:
        if split is None:
            return ()
        return tuple(
            _parsed(source.parse, row, f"{split}-{i}") for i, row in enumerate(_records(source, split, data_root))
        )

    return Task(name, rows(source.train), rows(source.evaluation), prompt=source.prompt)


def _parsed(parse: Parse, row: Record, key: str) -> Question:
    try:
        return parse(row, key)
    except KeyError as error:
        raise ValueError(f"row {key}: no column {error}; got the columns {sorted(row)}") from None


def _records(source: Source, split: str, data_root: Path | None) -> Iterator[Record]:
    if data_root is None:
        from datasets import load_dataset

        yield from load_dataset(source.hub_id, source.config, split=split)  # type: ignore[misc]
        return
    path = data_root / source.hub_id / source.config / f"{split}.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"no such split: got {path}, expected <root>/<hub id>/<config>/<split>.jsonl")
    yield from _json_lines(path)


def _json_lines(path: Path) -> Iterator[Record]:
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
        records = list(_json_lines(path))
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


def own_task(name: str, train: Sequence[Question], evaluation: Sequence[Question]) -> Task:
    """A task of the user's own rows; the prompt has a passage if any row has a context."""
    passages = any(row.context for row in (*train, *evaluation))
    return Task(name, tuple(train), tuple(evaluation), prompt=PASSAGE_CHOICES if passages else CHOICES)


def check_trainable(task: Task) -> None:
    """Refuses training rows that nothing can be learnt from.

    Raises:
        ValueError: if there are no training rows, or all have the same option as their answer.
    """
    if not task.train:
        raise ValueError(f"task {task.name} has no training rows; train on another task and evaluate on this one")
    if len({row.answer for row in task.train}) == 1:
        raise ValueError(
            f"all {len(task.train)} training rows of {task.name} have the same answer, option {task.train[0].answer}: "
            "got one class, expected two or more"
        )
