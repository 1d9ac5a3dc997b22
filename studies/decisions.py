"""Do the decisions keep their word? The whole procedure, choices included, on simulated rows.

    python -m studies.decisions run [--repetitions 1000] [--model NAME …] [--rows N …]
    python -m studies.decisions table

Each model of confidence gives a row's true probabilities π, the logits of a mean and of draws, and
so what a calibration sees; the risk of its threshold is the mean of 1 − π(ĉ) over those of 2,000
new rows that it acts on. Records go to results/decisions/records.jsonl.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bayestune.decisions import (
    Calibration,
    CalibrationOptions,
    HeldOut,
    Promise,
    Variant,
    calibrate,
    decide,
    drift_test,
    score_rows,
)
from bayestune.errors import Refusal
from bayestune.runtime import versions
from bayestune.whole_files import read_json_lines, write_json_lines

FOLDER = Path(__file__).parents[1] / "results/decisions"
DRAWS = 5
CLASSES = 4
POPULATION = 2000
PROMISE = Promise(0.05, 0.9)
COVERAGE = 0.9


@dataclass(frozen=True, eq=False)
class Rows:
    """True probabilities π (N, C), the mean's logits (1, N, C), the draws' (S, N, C)."""

    truth: Tensor
    mean: Tensor
    draws: Tensor

    def taken(self, index: Tensor) -> "Rows":
        """Some of the rows."""
        return Rows(self.truth[index], self.mean[:, index], self.draws[:, index])

    def logits(self, variant: str) -> Tensor:
        """What a variant predicts."""
        return self.mean if variant == "mean" else self.draws


def _rows(truth: Tensor, seen: Tensor, sharpness: float, noise: float, g: torch.Generator) -> Rows:
    """Logits sharpness · log(seen) + noise, a noise of its own for the mean and for each draw."""
    shape = (1 + DRAWS, *truth.shape)
    logits = sharpness * seen.log() + noise * torch.randn(shape, generator=g, dtype=torch.float64)
    return Rows(truth, logits[:1], logits[1:])


def _truth(count: int, scale: float, g: torch.Generator) -> Tensor:
    logits = scale * torch.randn(count, CLASSES, generator=g, dtype=torch.float64)
    return logits.softmax(-1).clamp_min(1e-6)


def calibrated(count: int, g: torch.Generator) -> Rows:
    """Nearly the true probabilities of easy rows, with a little noise by draw."""
    truth = _truth(count, 12.0, g)
    return _rows(truth, truth, 1.0, 0.3, g)


def overconfident(count: int, g: torch.Generator) -> Rows:
    """Logits three times too large."""
    truth = _truth(count, 5.0, g)
    return _rows(truth, truth, 3.0, 1.0, g)


def noisy(count: int, g: torch.Generator) -> Rows:
    """Draws that differ much, and a mean that is no better than one of them."""
    truth = _truth(count, 5.0, g)
    return _rows(truth, truth, 1.0, 2.5, g)


def confidently_wrong(count: int, g: torch.Generator) -> Rows:
    """The surest fifth of the rows is wrong in 12 % of cases, the others far less than they say."""
    seen = _truth(count, 5.0, g)
    sure = seen.amax(-1) > seen.amax(-1).quantile(0.8)
    other = seen.roll(1, -1)
    truth = torch.where(sure[:, None], 0.88 * seen + 0.12 * other, _sharper(seen))
    return _rows(truth, seen, 1.0, 0.3, g)


def _sharper(p: Tensor) -> Tensor:
    return p.square() / p.square().sum(-1, keepdim=True)


def useless(count: int, g: torch.Generator) -> Rows:
    """Confidence that says nothing: every row is wrong in 5.1 % of cases; the promise is 5 %."""
    seen = _truth(count, 5.0, g)
    truth = torch.full_like(seen, 0.051 / (CLASSES - 1))
    truth.scatter_(-1, seen.argmax(-1, keepdim=True), 0.949)
    return _rows(truth, seen, 1.0, 0.0, g)


MODELS: dict[str, Callable[[int, torch.Generator], Rows]] = {
    model.__name__: model
    for model in (calibrated, overconfident, noisy, confidently_wrong, useless)
}


def held_out(rows: Rows, seed: int, g: torch.Generator) -> HeldOut:
    """Labels drawn from the truth, and contents that name the rows."""
    labels = torch.multinomial(rows.truth, 1, generator=g)[:, 0]
    return HeldOut(labels, [f"{seed}:{index}" for index in range(len(labels))])


def outcome(found: Calibration, population: Rows) -> dict[str, float | bool | str]:
    """The realised risk, coverage, and cover of the sets of one calibration."""
    decision = decide(found, population.logits(found.variant))
    acts = torch.tensor([word == "act" for word in decision.decisions or []])
    chosen = population.truth.gather(-1, decision.choice[:, None])[:, 0]
    risk = (1 - chosen[acts]).mean().item() if acts.any() else 0.0
    return {
        "broken": risk > PROMISE.risk,
        "acts": bool(acts.any()),
        "share_acted": acts.double().mean().item(),
        "cover": (population.truth * decision.sets).sum(-1).mean().item(),
        "size": decision.sets.double().sum(-1).mean().item(),
        "variant": found.variant,
        "tempered": found.temperature != 1,
        "score": found.score,
    }


def cell(model: str, num_rows: int, repetitions: int) -> dict[str, object]:
    """One model and number of rows: shares over repetitions."""
    g = torch.Generator().manual_seed(num_rows)
    asked = CalibrationOptions(PROMISE, set_coverage=COVERAGE)
    began = time.process_time()
    outcomes = []
    refused = 0
    for seed in range(repetitions):
        rows = MODELS[model](num_rows, g)
        variants = {
            "mean": Variant(rows.mean, 1.0),
            "draws": Variant(rows.draws, float(DRAWS)),
        }
        try:
            found = calibrate(variants, held_out(rows, seed, g), asked)
        except Refusal:
            refused += 1
            continue
        outcomes.append(outcome(found, MODELS[model](POPULATION, g)))
    record = {
        "study": "decisions",
        "model": model,
        "rows": num_rows,
        "repetitions": repetitions,
        "refused": refused,
        "risk": PROMISE.risk,
        "confidence": PROMISE.confidence,
        "set_coverage": COVERAGE,
        "seconds": time.process_time() - began,
        **versions(),
    }
    return record | (summary(outcomes) if outcomes else {})


def summary(outcomes: list[dict[str, float | bool | str]]) -> dict[str, object]:
    """Shares and means over repetitions, and the standard errors of the two that are promised."""
    count = len(outcomes)
    columns = ("broken", "acts", "share_acted", "cover", "size", "tempered")
    means = {name: sum(float(row[name]) for row in outcomes) / count for name in columns}
    spread = torch.tensor([float(row["cover"]) for row in outcomes]).std().item()
    scores: dict[str, int] = {}
    for row in outcomes:
        scores[str(row["score"])] = scores.get(str(row["score"]), 0) + 1
    return {
        **means,
        "broken_error": math.sqrt(max(means["broken"], 1 / count) * (1 - means["broken"]) / count),
        "cover_error": spread / math.sqrt(count),
        "draws_kept": sum(row["variant"] == "draws" for row in outcomes) / count,
        "scores": scores,
    }


def drift_cell(num_rows: int, repetitions: int) -> dict[str, object]:
    """How often drift is called at 5 % between held-out rows and as many of the same kind."""
    names = ("one_minus_confidence", "total_entropy", "corrected_mutual_information")
    g = torch.Generator().manual_seed(num_rows)
    began = time.process_time()
    alarms = 0
    for seed in range(repetitions):
        old = score_rows(calibrated(num_rows, g).draws, names)
        new = score_rows(calibrated(num_rows, g).draws, names)
        alarms += drift_test(old, new, 99, seed).p_value <= 0.05
    rate = alarms / repetitions
    return {
        "study": "drift",
        "model": "drift",
        "rows": num_rows,
        "repetitions": repetitions,
        "level": 0.05,
        "false_alarms": rate,
        "false_alarms_error": math.sqrt(max(rate, 1 / repetitions) * (1 - rate) / repetitions),
        "seconds": time.process_time() - began,
        **versions(),
    }


def run(models: list[str], sizes: list[int], repetitions: int, path: Path) -> None:
    """Runs the cells that the file lacks, and keeps each as soon as it is there."""
    records = read_json_lines(path, missing_ok=True)
    done = {(r["model"], r["rows"], r["repetitions"]) for r in records}
    path.parent.mkdir(parents=True, exist_ok=True)
    for num_rows in sizes:
        for model in models:
            if (model, num_rows, repetitions) in done:
                continue
            of_drift = model == "drift"
            new = (
                drift_cell(num_rows, repetitions)
                if of_drift
                else cell(model, num_rows, repetitions)
            )
            records.append(new)
            write_json_lines(path, records)
            print(new)


def table(path: Path) -> str:
    """The records as two Markdown tables."""
    lines = [
        "| model | rows | runs | refused | broken | acts at all | acted on | sets' cover | size |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    drifts = ["", "| rows | runs | false alarms of drift at 5 % |", "|---|---|---|"]
    for r in read_json_lines(path):
        if r["study"] == "drift":
            rate = f"{r['false_alarms']:.3f} ± {r['false_alarms_error']:.3f}"
            drifts.append(f"| {r['rows']} | {r['repetitions']} | {rate} |")
            continue
        front = f"| {r['model']} | {r['rows']} | {r['repetitions']} | {r['refused']}"
        if "broken" not in r:
            lines.append(f"{front} | | | | | |")
        else:
            broken = f"{r['broken']:.3f} ± {r['broken_error']:.3f}"
            cover = f"{r['cover']:.3f} ± {r['cover_error']:.3f}"
            acted = f"{r['acts']:.2f} | {r['share_acted']:.2f}"
            lines.append(f"{front} | {broken} | {acted} | {cover} | {r['size']:.2f} |")
    return "\n".join(lines + drifts) + "\n"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--repetitions", type=int, default=1000)
    parser.add_argument("--model", nargs="*", default=[*MODELS, "drift"])
    parser.add_argument("--rows", nargs="*", type=int, default=[60, 100, 300, 1000])
    parser.add_argument("--output", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = arguments.output / "records.jsonl"
    if arguments.what == "run":
        run(arguments.model, arguments.rows, arguments.repetitions, path)
    else:
        (arguments.output / "table.md").write_text(table(path), encoding="utf-8")


if __name__ == "__main__":
    main()
