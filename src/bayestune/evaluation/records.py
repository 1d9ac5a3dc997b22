"""The record of an evaluation: made, appended and read."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bayestune.data import Question
from bayestune.evaluation.evaluate import EvaluationOptions
from bayestune.jsonl import write_json_lines
from bayestune.metrics import Bins, summarise
from bayestune.posteriors import Posterior, Prediction
from bayestune.runtime import peak_memory_mb, revision, versions

RECORDS = "records.jsonl"


def prediction_rows(
    questions: Sequence[Question], prediction: Prediction, *, texts: bool = True
) -> list[dict[str, Any]]:
    """One JSON-ready dict a row: the question, its probabilities, confidence and uncertainty parts in nats."""
    names = ("confidence", "total_entropy", "expected_entropy", "mutual_information")
    columns = {name: getattr(prediction, name).tolist() for name in names}
    choices = prediction.choice.tolist()
    return [
        {
            "id": row.id,
            **({"question": row.question, "options": list(row.options)} if texts else {}),
            "answer": row.answer,
            "choice": choices[i],
            "probabilities": prediction.probabilities[i, : len(row.options)].tolist(),
            **{name: column[i] for name, column in columns.items()},
        }
        for i, row in enumerate(questions)
    ]


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records of a results folder; none if it has none yet."""
    path = folder / RECORDS
    if not path.is_file():
        return []
    return [
        json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()
    ]


def make_record(
    record: Mapping[str, Any],
    questions: Sequence[Question],
    prediction: Prediction,
    settings: EvaluationOptions,
    predictions: str,
) -> dict[str, Any]:
    """A record with its metrics, and with what a reader needs to trust them.

    Args:
        record: method, label, draws and whatever else describes the run.
        questions: the rows, all with an answer.
        prediction: of the rows.
        settings: bins and bootstrap.
        predictions: the file of the rows' probabilities, as seen from the results folder.

    Returns:
        A JSON-able dict.
    """
    labels = torch.tensor([row.answer for row in questions])
    summary = summarise(
        prediction.probabilities, labels, Bins(settings.bins, settings.binning), settings.resamples
    )
    return {
        **record,
        "n": len(questions),
        "bins": settings.bins,
        "binning": settings.binning,
        "metrics": {key: asdict(interval) for key, interval in summary.items()},
        "predictions": predictions,
        "peak_memory_mb": round(peak_memory_mb()),
        "versions": versions(),
        "revision": revision(),
    }


def append_record(
    folder: Path,
    record: Mapping[str, Any],
    questions: Sequence[Question],
    prediction: Prediction,
    settings: EvaluationOptions,
) -> dict[str, Any]:
    """Writes the rows' probabilities beside and appends one line with the metrics to `records.jsonl`.

    Args:
        folder: the results folder.
        record: method, label, draws and whatever else describes the run.
        questions: the rows, all with an answer.
        prediction: of the rows.
        settings: bins and bootstrap.

    Returns:
        The record as written.
    """
    name = f"rows-{len(read_records(folder)) + 1}-{record['method']}-{record['draws']}-{record['seed']}.jsonl"
    write_json_lines(folder / name, prediction_rows(questions, prediction, texts=settings.texts))
    whole = make_record(record, questions, prediction, settings, name)
    with (folder / RECORDS).open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(whole, ensure_ascii=False, default=str) + "\n")
    return whole


def label_of(
    method: str, draws: int, posterior: Posterior, shared_prefix: int | None = None
) -> str:
    """How a line of the table is called; draws that share a prefix say so."""
    if posterior.atoms is not None:
        return method
    return f"{method} N={draws}" + (
        f", prefix {shared_prefix}" if draws and shared_prefix is not None else ""
    )
