"""Puts rows to a model as a fit's were, under its prompt and classes, and knows its training rows.

`details` is throughout what `posterior.json` says of the fit.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from bayestune.data import (
    Prompt,
    Question,
    ReadOptions,
    Scoring,
    SortedRows,
    Task,
    checked_columns,
    own_task,
    refuse_unshown,
)
from bayestune.errors import Refusal

logger = logging.getLogger(__name__)


def task_as_fitted(
    task: Task,
    prompt: Prompt,
    scoring: Scoring,
    classes: Sequence[str] | None,
    *,
    warns: bool = True,
) -> Task:
    """The task under the prompt of a fit, whatever its own is.

    Where the model does not read the options, as under a classification head, every row must have
    the fit's options, and gets them in the fit's order.

    Args:
        task: the rows.
        prompt: of the fit.
        scoring: of the fit.
        classes: the options that all rows of the fit had, in order; None if they differed.
        warns: whether to warn if the prompt has a place for a context and no row has one.

    Raises:
        Refusal: if a row has a context or earlier messages for which the prompt has no place, or
            other options than `classes` where the model does not read them.
    """
    template = prompt.template(scoring)
    rows = (*task.held_out, *task.evaluation, *task.unlabelled)
    count = sum(bool(row.context) for row in rows)
    has_place = scoring == "head" or "{context}" in template
    if count and not has_place:
        raise Refusal(
            f"{count} rows of {task.name} have a context: got a fit whose rows had none, expected "
            "rows without, because its prompt has no place for one; drop the column, or fit on "
            "rows that have a context"
        )
    refuse_unshown(prompt, rows, scoring)
    if warns and rows and not count and "{context}" in template and scoring != "head":
        logger.warning("no row of %s has a context, which the fitted prompt shows", task.name)
    if classes and not _options_are_read(template, scoring):
        task = task.in_class_order(classes)
    return replace(task, prompt=prompt)


def rows_as_fitted(rows: Sequence[Question], details: Mapping[str, Any]) -> tuple[Question, ...]:
    """The rows of one request, with their options in the fit's order as in `task_as_fitted`.

    Raises:
        Refusal: if a row has a context for which the prompt has no place, or other classes.
    """
    task = own_task("this request", (), rows)
    prompt = prompt_of_fit(details)
    classes = classes_of_fit(details)
    return task_as_fitted(task, prompt, details["scoring"], classes, warns=False).evaluation


def prompt_of_fit(details: Mapping[str, Any]) -> Prompt:
    """The prompt that a fit's folder keeps."""
    fields = details["task"]["prompt"]
    later = {name: fields[name] for name in ("chat", "system") if name in fields}
    # folders of 0.2 do not say it: there the end of a chat's prompt alone decided
    later["spaced_by_end"] = fields.get("spaced_by_end", bool(fields.get("chat")))
    return Prompt(fields["letter"], fields["text"], tuple(fields["labels"]), **later)


def _options_are_read(template: str, scoring: Scoring) -> bool:
    """Whether the model reads the options, in the prompt or behind it."""
    if scoring == "head":
        return False
    return scoring == "text" or "{choices}" in template or "{texts_first}" in template


def with_classes_of_fit(rows: SortedRows, details: Mapping[str, Any]) -> SortedRows:
    """The rows of a file, those whose options are not the fit's classes moved to the problems.

    Args:
        rows: of the file.
        details: of the fit.

    Raises:
        Refusal: if no row is left.
    """
    classes = classes_of_fit(details)
    scoring = details["scoring"]
    template = details["task"]["prompt"]["letter" if scoring == "letter" else "text"]
    if not classes or _options_are_read(template, scoring):
        return rows
    kept = []
    problems = dict(rows.problems)
    total = len(rows.questions) + len(problems)
    numbers = [number for number in range(total) if number not in problems]  # of the questions
    for number, row in zip(numbers, rows.questions, strict=True):
        try:
            kept.append(row.with_options(classes))
        except Refusal as problem:
            problems[number] = (row.id, problem)
    if not kept:
        raise problems[numbers[0]][1]
    return SortedRows(tuple(kept), problems)


def lines_of_all_rows(
    rows: SortedRows, lines: Iterator[dict[str, Any]], start: int = 0
) -> Iterator[dict[str, Any]]:
    """The lines of all rows of a file, in its order; a row that cannot be read has an `error`.

    Args:
        rows: of the file.
        lines: one for each row that can be read, from row `start` on.
        start: how many rows of the file are answered already.
    """
    count = len(rows.questions) + len(rows.problems)
    for number in range(start, count):
        if number in rows.problems:
            key, problem = rows.problems[number]
            yield {"id": key, "error": str(problem)}
        else:
            yield next(lines)


def classes_of_fit(details: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The options that all rows of a fit had, in order; None if they differed or no one says."""
    names = details.get("class_names") or details.get("questions", {}).get("options")
    return tuple(names) if names else None


def seen_rows(details: Mapping[str, Any], rows: Sequence[Question]) -> int | None:
    """How many of these rows the fit was trained on, by content; None if an old folder."""
    if "seen" not in details:
        return None
    if not rows:
        return 0
    trained_on = seen_fingerprints(details, len(rows[0].fingerprint))
    return sum(row.fingerprint in trained_on for row in rows)


def seen_facts(details: Mapping[str, Any], rows: Sequence[Question]) -> dict[str, int]:
    """What `seen_rows` counts, as a fact of a record; no fact for an old folder."""
    count = seen_rows(details, rows)
    return {} if count is None else {"seen_rows": count}


def seen_fingerprints(details: Mapping[str, Any], size: int) -> set[str]:
    """The fingerprints of a fit's training rows, `size` characters each; none in old folders."""
    text = details.get("seen", "")
    return {text[start : start + size] for start in range(0, len(text), size)}


def fingerprints(rows: Iterable[Question]) -> str:
    """The fingerprints of rows, sorted, each once, in one string: `seen` of a fit's folder."""
    return "".join(sorted({row.fingerprint for row in rows}))


def warn_of_seen_rows(task: str, count: int, total: int) -> None:
    """Warns of evaluation rows that stand in the training rows too.

    Args:
        task: its name.
        count: how many do; nothing is said of none.
        total: how many evaluation rows there are.
    """
    if count:
        warning = (
            "%d of the %d evaluation rows of %s stand in the training rows too: figures on them "
            "say nothing of new rows"
        )
        logger.warning(warning, count, total, task)


def warn_of_repeated_rows(what: str, rows: Sequence[Question], *, evaluated: bool) -> None:
    """Warns of rows that contradict each other, and of evaluation rows that repeat others.

    Two rows have one content if they ask the same, whatever the order of their options; they
    contradict each other if their answers differ.

    Args:
        what: the name of the rows in the warnings, such as "training rows".
        rows: with answers.
        evaluated: whether figures and intervals are made of them.
    """
    answers: dict[str, set[str]] = {}  # by content
    for row in rows:
        if row.answer is not None:
            answers.setdefault(row.fingerprint, set()).add(row.options[row.answer])
    contradicting = [row for row in rows if len(answers.get(row.fingerprint, ())) > 1]
    if contradicting:
        warning = (
            "%d of the %d %s have a content that others have with another answer, such as %s: %r"
        )
        example = contradicting[0]
        shown = example.question[:60]
        logger.warning(warning, len(contradicting), len(rows), what, example.id, shown)
    repeated = len(rows) - len({row.fingerprint for row in rows})
    if evaluated and repeated:
        warning = (
            "%d of the %d %s repeat the content of others: intervals take each for a further row"
        )
        logger.warning(warning, repeated, len(rows), what)


def read_options_of_fit(details: Mapping[str, Any]) -> ReadOptions:
    """How files of rows are read for a fit, unless the user says otherwise: as its own were."""
    questions = details.get("questions", {})
    return ReadOptions(
        otherwise=options_of(details),
        usual_answer_is=questions.get("answer_is"),
        usual_columns=checked_columns(questions.get("columns", {})),
    )


def options_of(details: Mapping[str, Any]) -> tuple[str, ...]:
    """The options that all rows of a fit shared; none if each had its own."""
    return tuple(details.get("questions", {}).get("options") or ())
