"""The rows that the page shows: as many as fit, those that a run gets wrong first."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from bayestune.metrics import Row
from bayestune.report.claims import Evaluation
from bayestune.report.page_json import Payload, json_bytes
from bayestune.report.panels import short
from bayestune.report.rows import common_texts, row_key

RowKey = tuple[Any, ...]  # rows of two runs with the same key are answers to one question


class Trim(NamedTuple):
    """How much of the rows is kept."""

    share_with_draws: float  # of the rows that are kept
    num_rows: int
    characters: int  # of an option; of a question and a context ten times as many


_TRIMS = (  # tried in turn until the rows fit
    Trim(1.0, 20_000, 400),
    Trim(0.5, 4_000, 200),
    Trim(0.2, 2_000, 100),
    Trim(0.0, 1_000, 60),
    Trim(0.0, 300, 40),
    Trim(0.0, 100, 20),
)


def rows_within(evaluations: Sequence[Evaluation], max_bytes: int) -> Payload:
    """Questions and answers, of fewer draws and then of fewer rows until they fit.

    Args:
        evaluations: the runs.
        max_bytes: of the JSON; more if the fewest rows do not fit either.

    Returns:
        `questions`, `answers` by run, and `left_out`: how many questions the page does not show.
    """
    questions: dict[RowKey, dict[int, Row]] = {}  # for each, by run, the row with its answer
    common = common_texts([evaluation.rows for evaluation in evaluations])
    for index, evaluation in enumerate(evaluations):
        task = evaluation.record.get("task")
        for row in evaluation.rows:
            key = (*row_key(row, common), task, len(row["probabilities"]))
            questions.setdefault(key, {})[index] = row
    ranked = sorted(questions.items(), key=lambda item: -_interest(item[1].values()))
    trimmed: Payload = {}
    for trim in _TRIMS:
        kept = ranked[: trim.num_rows]
        trimmed = _rows(kept, round(trim.share_with_draws * len(kept)), trim.characters)
        trimmed["left_out"] = len(ranked) - len(kept)
        if json_bytes(trimmed) <= max_bytes:
            break
    return trimmed


def _interest(rows: Iterable[Row]) -> float:
    """The largest over runs of 1 + confidence where it is wrong, and 1 − confidence where right."""
    worst = 0.0
    for row in rows:
        wrong = max(row["probabilities"]) > row["probabilities"][row["answer"]]
        worst = max(worst, row["confidence"] + 1 if wrong else 1 - row["confidence"])
    return worst


def _rows(
    keyed: Sequence[tuple[RowKey, Mapping[int, Row]]], with_draws: int, characters: int
) -> Payload:
    """Each question once, and each run's answers to them, probabilities in ten-thousandths.

    The first `with_draws` rows keep their draws; options keep so many characters, texts ten times.
    """
    questions = []
    answers: dict[int, list[list[Any]]] = {}
    for number, (key, runs) in enumerate(keyed):
        with_texts = next((row for row in runs.values() if row.get("question")), {})
        row_id, answer, *_ = key
        question = {"id": str(row_id), "answer": answer}
        for name in ("question", "context"):
            if with_texts.get(name):
                question[name] = _cut(str(with_texts[name]), 10 * characters)
        if with_texts.get("options"):
            options = with_texts["options"]
            question["options"] = [_cut(str(option), characters) for option in options]
        questions.append(question)
        for run, row in runs.items():
            answers.setdefault(run, []).append(_answer(number, row, number < with_draws))
    return {"questions": questions, "answers": {str(run): answers[run] for run in sorted(answers)}}


def _answer(number: int, row: Row, with_draws: bool) -> list[Any]:
    """The question's number, probabilities, entropies, decision, set and draws: docs/report.md."""
    entropies = ("total_entropy", "expected_entropy", "mutual_information")
    drawn = [_units(draw) for draw in row.get("drawn") or ()] if with_draws else []
    return [
        number,
        _units(row["probabilities"]),
        *(short(row[key]) for key in entropies),
        row.get("decision"),
        row.get("set"),
        drawn,
    ]


def _units(probabilities: Sequence[float]) -> list[int]:
    return [round(10_000 * p) for p in probabilities]


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
