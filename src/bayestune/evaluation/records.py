"""The record of an evaluation and the rows beside it: made, kept and read."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayestune.data import Question
from bayestune.evaluation.adaptive import AdaptivePrediction
from bayestune.evaluation.evaluate import DRAWS_KEPT, Evaluated, EvaluationOptions
from bayestune.evaluation.gates import class_record, gate_record
from bayestune.metrics import Bins, summarise
from bayestune.posteriors import Posterior, Prediction
from bayestune.runtime import peak_memory_mb, revision, versions
from bayestune.whole_files import read_json_lines, write_json_lines

RECORDS = "records.jsonl"
Record = dict[str, Any]
# fields that may differ between two records of the same evaluation
_VOLATILE = ("seconds", "timed_draws", "peak_memory_mb", "versions", "revision", "predictions")
_VOLATILE += ("gate", "by_class")  # follow from the rows, as the metrics do
_VOLATILE += ("date", "fit")
_UNCERTAINTY = ("confidence", "total_entropy", "expected_entropy", "mutual_information")


@dataclass(frozen=True)
class Result:
    """A record that is not written yet, and the rows that go beside it."""

    record: Record
    rows: list[dict[str, Any]]

    def keep_rows(self, folder: Path, file: str) -> Record:
        """Writes the rows to a file of the results folder; returns the record that names it."""
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        write_json_lines(folder / file, self.rows)
        return {**self.record, "predictions": file}


def make_result(
    facts: Mapping[str, Any],
    questions: Sequence[Question],
    evaluated: Evaluated,
    options: EvaluationOptions,
) -> Result:
    """The record of an evaluation, and its rows.

    Args:
        facts: of the run (task, method, label, config, …), which the record begins with.
        questions: N rows, all with an answer.
        evaluated: their prediction.
        options: which it was made with; bins and resamples of the metrics are taken from them.
    """
    prediction = evaluated.prediction
    answers = torch.tensor([row.answer for row in questions])
    bins = Bins(options.bins, options.binning)
    losses = _losses(prediction, answers)
    summary = summarise(prediction.probabilities, answers, bins, options.resamples, losses)
    record = {
        **facts,
        "config": {**facts.get("config", {}), "predicting": asdict(options)},
        "draws": evaluated.draws,
        "seconds": {**facts.get("seconds", {}), "predict": round(evaluated.seconds, 1)},
        "timed_draws": evaluated.timed_draws,
        "n": len(questions),
        "bins": options.bins,
        "binning": options.binning,
        "metrics": {key: asdict(interval) for key, interval in summary.items()},
        "gate": gate_record(prediction.probabilities, questions),
        "peak_memory_mb": round(peak_memory_mb()),
        "versions": versions(),
        "revision": revision(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if (by_class := class_record(prediction.probabilities, questions)) is not None:
        record["by_class"] = by_class
    rows = _with_draws(prediction_rows(questions, prediction, texts=options.texts), prediction)
    if options.texts:
        contexts = [{"context": row.context} if row.context else {} for row in questions]
        rows = [row | context for row, context in zip(rows, contexts, strict=True)]
    if losses is not None:
        rows = [{**row, "nll": loss} for row, loss in zip(rows, losses.tolist(), strict=True)]
    return Result(record, rows)


def _losses(prediction: Prediction, answers: Tensor) -> Tensor | None:
    """−log p of each row's answer in nats, (N,), exact even where p is rounded to 0."""
    logs = prediction.log_probabilities
    return None if logs is None else -logs.gather(1, answers[:, None])[:, 0]


def label_of(
    method: str, draws: int, posterior: Posterior, shared_prefix: int | None = None
) -> str:
    """The name of a line in a table, such as "BLoB N=10, prefix 16".

    Args:
        method: its name.
        draws: S; 0 is the mean.
        posterior: one with `atoms` goes by its method alone.
        shared_prefix: m, if the draws share a prefix.
    """
    if posterior.atoms is not None:
        return method
    prefix = f", prefix {shared_prefix}" if draws and shared_prefix is not None else ""
    return f"{method} N={draws}{prefix}"


def prediction_rows(
    questions: Sequence[Question], prediction: Prediction, *, texts: bool = True
) -> list[dict[str, Any]]:
    """One JSON-ready dict a row: the question, its probabilities, its uncertainty in nats.

    Args:
        questions: N rows.
        prediction: of them.
        texts: whether the dicts repeat questions and options.
    """
    columns = {name: getattr(prediction, name).tolist() for name in _UNCERTAINTY}
    if isinstance(prediction, AdaptivePrediction):
        columns["draws"] = prediction.draws_used.tolist()
    choices = prediction.choice.tolist()
    rows = []
    for i, question in enumerate(questions):
        row = {"id": question.id, **(_texts(question) if texts else {})}
        row |= {"answer": question.answer, "choice": choices[i]}
        if texts:
            row["choice_text"] = question.options[choices[i]]
        row["probabilities"] = prediction.probabilities[i, : len(question.options)].tolist()
        rows.append(row | {name: column[i] for name, column in columns.items()})
    return rows


def _texts(question: Question) -> dict[str, Any]:
    return {"question": question.question, "options": list(question.options)}


def _with_draws(rows: list[dict[str, Any]], prediction: Prediction) -> list[dict[str, Any]]:
    """Rows with the probabilities of each draw, S lists a row; none of a single draw.

    They are for pictures: four decimals, and of more than 32 draws the first 32.
    """
    drawn = prediction.drawn
    if drawn is None or len(drawn) < 2:
        return rows
    by_row = drawn[:DRAWS_KEPT].transpose(0, 1)
    with_draws = []
    for row, draws in zip(rows, by_row, strict=True):
        of_options = draws[:, : len(row["probabilities"])].tolist()
        with_draws.append(row | {"drawn": [_rounded(draw) for draw in of_options]})
    return with_draws


def _rounded(numbers: Sequence[float]) -> list[float]:
    return [round(number, 4) for number in numbers]


def error_row(question: Question, problem: Exception) -> dict[str, Any]:
    """The line of a row that could not be put to the model, with the reason."""
    texts = _texts(question)
    return {"id": question.id, **texts, "answer": question.answer, "error": str(problem)}


def append_results(folder: Path, results: Sequence[Result]) -> None:
    """Adds records to `records.jsonl`, all or none, and files of their rows beside it.

    A record that says the same as an earlier one, as after a second `evaluate`, takes its place.

    Args:
        folder: of the results; made if it is not there.
        results: records and rows to add.
    """
    folder.mkdir(parents=True, exist_ok=True)
    records = read_records(folder)
    for result in results:
        places = [i for i, before in enumerate(records) if _says_the_same(before, result.record)]
        if places:
            records[places[0]] = result.keep_rows(folder, records[places[0]]["predictions"])
            continue
        name = "-".join(str(result.record[key]) for key in ("method", "draws", "seed"))
        records.append(result.keep_rows(folder, f"rows-{len(records) + 1}-{name}.jsonl"))
    write_json_lines(folder / RECORDS, records)


def _says_the_same(before: Record, now: Record) -> bool:
    """Whether two records are of one evaluation: same facts, same figures but for rounding."""
    facts = [key for key in now if key not in (*_VOLATILE, "metrics")]
    plain = json.loads(json.dumps({key: now[key] for key in facts}, default=str))
    if any(before.get(key) != value for key, value in plain.items()):
        return False
    earlier = before.get("metrics", {})
    if earlier.keys() != now["metrics"].keys():
        return False
    metrics = now["metrics"].items()
    return all(_same(earlier[key]["value"], metric["value"]) for key, metric in metrics)


def _same(one: float | None, other: float | None) -> bool:
    """Whether two values of a metric are equal but for rounding, or both missing or NaN."""
    if one is None or other is None:
        return one is other
    both_nan = math.isnan(one) and math.isnan(other)
    return both_nan or math.isclose(one, other, abs_tol=1e-5)


def read_records(folder: Path) -> list[Record]:
    """The records of a results folder; none if it has none yet."""
    return read_json_lines(folder / RECORDS, missing_ok=True)
