"""Rows are put as those of a fit were: its prompt, its classes; and none that it was trained on."""

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


def put_as_fitted(
    task: Task,
    prompt: Prompt,
    scoring: Scoring,
    classes: Sequence[str] | None,
    *,
    warns: bool = True,
) -> Task:
    """The task under the prompt of a fit, whatever its own is.

    Where the options do not stand in what the model reads, as under a classification head, they
    are the fit's, in its order.

    Args:
        task: the rows.
        prompt: of the fit.
        scoring: of the fit.
        classes: the options that all rows of the fit had, in order; None if they differed.
        warns: whether it says that no row has a context where the prompt has a place for one.

    Raises:
        Refusal: if a row has a context or earlier messages for which the prompt has no place, or
            other classes.
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
    if classes and not _is_shown(template, scoring):
        task = task.in_class_order(classes)
    return replace(task, prompt=prompt)


def rows_as_fitted(rows: Sequence[Question], details: Mapping[str, Any]) -> tuple[Question, ...]:
    """Some rows as a fit's were, such as those of one request: in the order of its classes.

    Raises:
        Refusal: if a row has a context for which the prompt has no place, or other classes.
    """
    how = (prompt_of_fit(details), details["scoring"], classes_of(details))
    return put_as_fitted(own_task("this request", (), rows), *how, warns=False).evaluation


def prompt_of_fit(details: Mapping[str, Any]) -> Prompt:
    """The prompt that a fit's folder keeps."""
    kept = details["task"]["prompt"]
    more = {name: kept[name] for name in ("chat", "system") if name in kept}
    more["spaced_by_end"] = kept.get("spaced_by_end", bool(kept.get("chat")))  # not noted by 0.2
    return Prompt(kept["letter"], kept["text"], tuple(kept["labels"]), **more)


def _is_shown(template: str, scoring: Scoring) -> bool:
    """Whether the options stand in what the model reads."""
    if scoring == "head":
        return False
    return scoring == "text" or "{choices}" in template or "{texts_first}" in template


def of_its_classes(rows: SortedRows, details: Mapping[str, Any]) -> SortedRows:
    """The rows of a file without those whose options are not the classes of a fit.

    Raises:
        Refusal: if none is left.
    """
    classes = classes_of(details)
    scoring = details["scoring"]
    template = details["task"]["prompt"]["letter" if scoring == "letter" else "text"]
    if not classes or _is_shown(template, scoring):
        return rows
    kept = []
    problems = dict(rows.problems)
    numbers = [n for n in range(len(rows.questions) + len(problems)) if n not in problems]
    for number, row in zip(numbers, rows.questions, strict=True):
        try:
            kept.append(row.with_options(classes))
        except Refusal as problem:
            problems[number] = (row.id, problem)
    if not kept:
        raise problems[numbers[0]][1]
    return SortedRows(tuple(kept), problems)


def in_order(
    rows: SortedRows, lines: Iterator[dict[str, Any]], start: int = 0
) -> Iterator[dict[str, Any]]:
    """The lines of all rows of a file in their order; of one that cannot be read, its `error`.

    Args:
        rows: of the file.
        lines: of rows that can be read, without those that stand before `start`.
        start: how many rows of the file are answered already.
    """
    count = len(rows.questions) + len(rows.problems)
    for number in range(start, count):
        if number in rows.problems:
            key, problem = rows.problems[number]
            yield {"id": key, "error": str(problem)}
        else:
            yield next(lines)


def classes_of(details: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The options that all rows of a fit had, in their order, as far as its folder tells."""
    names = details.get("class_names") or details.get("questions", {}).get("options")
    return tuple(names) if names else None


def seen_rows(details: Mapping[str, Any], rows: Sequence[Question]) -> int | None:
    """How many of the rows a fit was trained on, by their content; None if its folder is older."""
    if "seen" not in details:
        return None
    known = seen_fingerprints(details, len(next(iter(rows)).fingerprint) if rows else 1)
    return sum(row.fingerprint in known for row in rows)


def seen_facts(details: Mapping[str, Any], rows: Sequence[Question]) -> dict[str, int]:
    """The same as records say it; nothing of an older folder."""
    seen = seen_rows(details, rows)
    return {} if seen is None else {"seen_rows": seen}


def seen_fingerprints(details: Mapping[str, Any], size: int) -> set[str]:
    """The fingerprints, of so many characters, of a fit's training rows; none in older folders."""
    text = details.get("seen", "")
    return {text[start : start + size] for start in range(0, len(text), size)}


def fingerprints(rows: Iterable[Question]) -> str:
    """The fingerprints of rows, each once, as a fit's folder keeps them."""
    return "".join(sorted({row.fingerprint for row in rows}))


def say_seen(task: str, count: int, total: int) -> None:
    """Says aloud that rows to evaluate on stand in the training rows."""
    if count:
        said = (
            "%d of the %d evaluation rows of %s stand in the training rows too: figures on them "
            "say nothing of new rows"
        )
        logger.warning(said, count, total, task)


def say_repeated(what: str, rows: Sequence[Question], *, evaluated: bool) -> None:
    """Says that rows repeat a content with another answer, and of evaluated ones any repeated row.

    Rows are the same whatever the order of their options.

    Args:
        what: the rows are, for the warning.
        rows: with answers.
        evaluated: whether figures and intervals are made of them.
    """
    answers: dict[str, set[str]] = {}
    for row in rows:
        if row.answer is not None:
            answers.setdefault(row.fingerprint, set()).add(row.options[row.answer])
    unlike = [row for row in rows if len(answers.get(row.fingerprint, ())) > 1]
    if unlike:
        said = "%d of the %d %s have a content that others have with another answer, such as %s: %r"
        logger.warning(said, len(unlike), len(rows), what, unlike[0].id, unlike[0].question[:60])
    repeated = len(rows) - len({row.fingerprint for row in rows})
    if evaluated and repeated:
        said = "%d of the %d %s repeat the content of others: intervals take each for a further row"
        logger.warning(said, repeated, len(rows), what)


def usual_reading(details: Mapping[str, Any]) -> ReadOptions:
    """How files of rows for a fit are read where nobody says otherwise: as those of the fit."""
    questions = details.get("questions", {})
    return ReadOptions(
        otherwise=options_of(details),
        usual_answer_is=questions.get("answer_is"),
        usual_columns=checked_columns(questions.get("columns", {})),
    )


def options_of(details: Mapping[str, Any]) -> tuple[str, ...]:
    """The options that a fit's rows shared, for rows that have none; none if they had their own."""
    return tuple(details.get("questions", {}).get("options") or ())
