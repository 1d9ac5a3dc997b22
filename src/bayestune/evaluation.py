"""A posterior and questions → probabilities of every row → one record for each number of draws."""

import json
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from bayestune.metrics import Bins, summarise
from bayestune.posterior import Draws, Posterior, Prediction
from bayestune.questions import Question
from bayestune.scoring import Encoded, Scorer
from bayestune.training import peak_memory_mb

RECORDS = "records.jsonl"


@dataclass(frozen=True)
class Predicting:
    """How a set of rows is predicted.

    Args:
        draws: numbers of draws to evaluate; 0 is the mean.
        draw_seed: of the held draws.
        prediction_batch: rows of one batch.
        max_tokens: tokens of one forward pass over all its draws: the memory bound.
        bins: of the calibration errors.
        binning: "torchmetrics" (as in the published figures) or "textbook".
        resamples: of the bootstrap.
        texts: whether the rows' files repeat questions and options; false where their licence forbids to pass them on.
        shared_prefix: m; an approximation, off by default: the mean adapter reads all but the last m tokens of the
            prompt, once for all draws. Not for the mean, and not for posteriors with `atoms`.
    """

    draws: tuple[int, ...] = (0, 5, 10)
    draw_seed: int = 0
    prediction_batch: int = 8
    max_tokens: int = 16384
    bins: int = 15
    binning: Literal["torchmetrics", "textbook"] = "torchmetrics"
    resamples: int = 1000
    texts: bool = True
    shared_prefix: int | None = None


def draw_logits(
    posterior: Posterior,
    scorer: Scorer,
    rows: Sequence[Encoded],
    draws: Draws,
    *,
    batch_size: int = 8,
    bf16: bool = False,
    progress: str | None = None,
) -> Tensor:
    """The logits of every row under the same held draws; batches hold rows of like length.

    Args:
        posterior: whose draws.
        scorer: made the rows.
        rows: N encoded rows.
        draws: which draws, and the bounds of a pass.
        batch_size: rows of a batch.
        bf16: bfloat16 autocast.
        progress: title of a progress bar; None for none.

    Returns:
        Logits (S, N, C) in the order of the rows, C the largest number of options, -inf where a row has fewer.
    """
    order = sorted(range(len(rows)), key=lambda i: rows[i]["length"])
    device = next(posterior.model.parameters()).device
    parts: dict[int, Tensor] = {}
    with (
        torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext(),
        tqdm(total=len(rows), desc=progress, unit="row", disable=progress is None) as bar,
    ):
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            batch = scorer.collate([rows[i] for i in places])
            batch.pop("labels", None)
            logits = posterior.logits(batch, draws).float().cpu()
            parts.update(zip(places, logits.unbind(1), strict=True))
            bar.update(len(places))
    width = max(part.shape[-1] for part in parts.values())
    padded = [
        torch.nn.functional.pad(parts[i], (0, width - parts[i].shape[-1]), value=-torch.inf) for i in range(len(rows))
    ]
    return torch.stack(padded, 1)


def evaluate_posterior(
    posterior: Posterior,
    scorer: Scorer,
    questions: Sequence[Question],
    settings: Predicting,
    *,
    bf16: bool = False,
    progress: bool = True,
) -> Iterator[tuple[int, Prediction, float]]:
    """The predictive for each number of draws: the first S of the same held draws, so that more draws only add.

    Args:
        posterior: to evaluate; one with `atoms` is evaluated once, with as many draws.
        scorer: the task, bound to the tokenizer.
        questions: the rows.
        settings: draws, batch and bounds.
        bf16: bfloat16 autocast.
        progress: show progress bars.

    Yields:
        Number of draws, prediction, and the seconds that this number of draws took.
    """
    rows = scorer.encode(questions)
    exact = None if posterior.atoms is None else (0 if posterior.atoms == 1 else posterior.atoms,)
    counts = exact or tuple(count for count in settings.draws if count or posterior.has_mean)

    def logits(count: int) -> tuple[Tensor, float]:
        prefix = settings.shared_prefix if count and exact is None else None
        draws = Draws(count, settings.draw_seed, max_tokens=settings.max_tokens, shared_prefix=prefix)
        begin = time.perf_counter()
        title = (f"predict, {count} draws" if count else "predict, mean") if progress else None
        values = draw_logits(
            posterior, scorer, rows, draws, batch_size=settings.prediction_batch, bf16=bf16, progress=title
        )
        return values, time.perf_counter() - begin

    most = max(counts)
    drawn, seconds = logits(most) if most else (torch.empty(0), 0.0)
    for count in counts:
        if count == 0:
            values, taken = logits(0)
            yield 0, Prediction.of(values), taken
        else:
            yield count, Prediction.of(drawn[:count]), seconds * count / most


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


def write_json_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line, as a whole or not at all."""
    scratch = path.with_name(f".{path.name}.partial")
    scratch.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    scratch.replace(path)


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records of a results folder; none if it has none yet."""
    path = folder / RECORDS
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def make_record(
    record: Mapping[str, Any],
    questions: Sequence[Question],
    prediction: Prediction,
    settings: Predicting,
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
    bins = Bins(settings.bins, settings.binning)
    summary = summarise(prediction.probabilities, labels, bins, settings.resamples)
    return {
        **record,
        "n": len(questions),
        "bins": settings.bins,
        "binning": settings.binning,
        "metrics": {key: asdict(interval) for key, interval in summary.items()},
        "predictions": predictions,
        "peak_memory_mb": round(peak_memory_mb()),
        "versions": versions(),
        "revision": git_revision(),
    }


def append_record(
    folder: Path,
    record: Mapping[str, Any],
    questions: Sequence[Question],
    prediction: Prediction,
    settings: Predicting,
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


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries a figure depends on."""
    names = ("bayestune", "torch", "transformers", "peft", "accelerate")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def git_revision() -> str | None:
    """The revision of the source checkout that is running, if it is one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
