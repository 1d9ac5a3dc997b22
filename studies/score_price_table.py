"""What was collected by `score_price`, as records and as a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayestune.decisions import (
    ONE_PASS,
    OVER_DRAWS,
    ROW_SCORES,
    CalibrationOptions,
    HeldOut,
    Promise,
    Spread,
    Variant,
    calibrate,
    free_baselines,
    score_rows,
)
from bayestune.errors import Refusal
from bayestune.metrics import auroc
from bayestune.metrics.proportions import share_interval

FOLDS = 5
REPEATS = 5  # of the folds, whose predictions are averaged
RIDGE = 1.0  # on standardised scores, in rows: as strong as one row
RESAMPLES = 1000
LEVEL = 0.95
PROMISED = 0.9  # the confidence of a promise
SHARED = ("model", "task", "seed", "train_rows")  # of a posterior and its control
ADDED = (*OVER_DRAWS, "distance", "prompt_length")
Record = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Collected:
    """One posterior on N rows.

    Args:
        facts: which.
        mean: logits of the mean adapter, (1, N, C).
        draws: logits (S, N, C).
        distance: (N,).
        prompt_length: (N,).
        labels: (N,).
    """

    facts: Mapping[str, Any]
    mean: Tensor
    draws: Tensor
    distance: Tensor
    prompt_length: Tensor
    labels: Tensor

    @property
    def beside(self) -> dict[str, Tensor]:
        """The scores that no logits give."""
        return {"distance": self.distance, "prompt_length": self.prompt_length}


def records_of(found: Collected, risks: Sequence[float]) -> list[Record]:
    """A record of what scores add, and one for each risk of what thresholds let through."""
    keys = (*SHARED, "fit", "method", "cpu_seconds", "versions")
    front = {"study": "score_price"} | {key: found.facts[key] for key in keys}
    front["rows"] = len(found.labels)
    records = [front | {"kind": "added", **added(found)}]
    for risk in risks:
        records.append(front | {"kind": "gate", "risk": risk, **realised(found, risk)})
    return records


# Thresholds


def realised(found: Collected, risk: float) -> Record:
    """Thresholds promised on one half of the rows, and the risk of each score on the other half.

    `calibrate` takes its two parts from the first half: ten draws, tempered if that is kept.
    """
    order = torch.randperm(len(found.labels), generator=torch.Generator().manual_seed(0))
    held, new = order.tensor_split(2)
    ids = found.facts["ids"]
    extra = {name: values[held] for name, values in found.beside.items()}
    variants = {"draws": Variant(found.draws[:, held], 1.0)}
    rows = HeldOut(found.labels[held], [ids[index] for index in held.tolist()], extra=extra)
    try:
        kept = calibrate(variants, rows, CalibrationOptions(Promise(risk, PROMISED)))
    except Refusal as problem:
        return {"refused": str(problem), "held_out": len(held), "new": len(new)}
    logits = found.draws[:, new]
    scores = score_rows(logits, ROW_SCORES, kept.temperature)
    scores |= {name: values[new].double() for name, values in found.beside.items()}
    wrong = Spread.of(logits, kept.temperature).choice != found.labels[new]
    by_score = {}
    for name, values in scores.items():
        acts = kept.thresholds[name].acts(values)
        by_score[name] = let_through(wrong[acts], len(new))
    options = (found.mean[0, new] > -torch.inf).sum(-1)
    return {
        "held_out": len(held),
        "new": len(new),
        "confidence": PROMISED,
        "decides": kept.score,
        "scores": by_score,
        "always_act": let_through(wrong, len(new)),
        **free_baselines(found.labels[new], options),
    }


def let_through(wrong: Tensor, rows: int) -> Record:
    """Of the rows acted on: their share, the errors, the risk and its interval."""
    count = len(wrong)
    errors = int(wrong.sum())
    low, high = share_interval(errors, count, LEVEL) if count else (0.0, 1.0)
    risk = errors / max(1, count)
    return {"coverage": count / rows, "errors": errors, "risk": risk, "low": low, "high": high}


# What a score adds


def added(found: Collected) -> Record:
    """AUROC for the mean's errors: all one-pass scores together, and with one score more."""
    once = score_rows(found.mean, ONE_PASS)
    more = score_rows(found.draws, OVER_DRAWS) | found.beside
    wrong = Spread.of(found.mean).choice != found.labels
    base = [once[name] for name in ONE_PASS]
    alone = {name: auroc(values, wrong) for name, values in (once | more).items()}
    before = cross_fitted(base, wrong)
    gains = {}
    for name in ADDED:
        after = cross_fitted([*base, more[name]], wrong)
        difference = auroc(after, wrong) - auroc(before, wrong)
        low, high = gain_interval(before, after, wrong)
        gains[name] = {"auroc": difference, "low": low, "high": high}
    return {
        "wrong": int(wrong.sum()),
        "one_pass": auroc(before, wrong),
        "alone": alone,
        "gains": gains,
    }


def cross_fitted(scores: Sequence[Tensor], wrong: Tensor) -> Tensor:
    """Log-odds of an error by logistic regression on the scores' ranks, from the other folds, (N,).

    Ranks, because a score is free in its scale and only its order shall count.
    """
    columns = [ranks(values) for values in scores]
    x = torch.stack([*columns, torch.ones_like(columns[0])], 1)
    total = torch.zeros(len(x), dtype=torch.float64)
    for repeat in range(REPEATS):
        generator = torch.Generator().manual_seed(repeat)
        fold = torch.randperm(len(x), generator=generator) % FOLDS
        for index in range(FOLDS):
            own = fold == index
            total[own] += x[own] @ logistic(x[~own], wrong[~own].double())
    return total / REPEATS


def ranks(values: Tensor) -> Tensor:
    """Ranks with mean 0 and variance 1; equal values have their middle rank."""
    ordered = values.double().sort().values
    left = torch.searchsorted(ordered, values.double())
    right = torch.searchsorted(ordered, values.double(), right=True)
    middle = (left + right).double() / 2
    centred = middle - middle.mean()
    return centred / centred.std().clamp_min(1e-12)


def logistic(x: Tensor, y: Tensor) -> Tensor:
    """Weights (k,) of the ridge-penalised likelihood of flags y (N,), by Newton's method.

    The last column is the constant one, which is not penalised.
    """
    penalty = torch.full((x.shape[1],), RIDGE, dtype=torch.float64)
    penalty[-1] = 0
    weights = torch.zeros(x.shape[1], dtype=torch.float64)
    for _ in range(25):
        p = (x @ weights).sigmoid()
        gradient = x.T @ (p - y) + penalty * weights
        curvature = x.T @ (x * (p * (1 - p)).clamp_min(1e-9)[:, None]) + penalty.diag()
        step = torch.linalg.solve(curvature, gradient)
        weights = weights - step
        if step.abs().max() < 1e-10:
            break
    return weights


def gain_interval(before: Tensor, after: Tensor, wrong: Tensor) -> tuple[float, float]:
    """The bootstrap's interval over rows of the difference of two AUROCs, the fits kept."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(RESAMPLES):
        index = torch.randint(len(wrong), (len(wrong),), generator=generator)
        own = wrong[index]
        if own.any() and not own.all():
            found.append(auroc(after[index], own) - auroc(before[index], own))
    tail = (1 - LEVEL) / 2
    low, high = torch.tensor(found).quantile(torch.tensor([tail, 1 - tail])).tolist()
    return low, high


# The table


def table(records: Sequence[Record]) -> str:
    """Markdown: what each score adds, and what each lets through."""
    of_gain = [record for record in records if record["kind"] == "added"]
    of_gates = [record for record in records if record["kind"] == "gate"]
    lines = _gain_lines(of_gain) + _control_lines(of_gain)
    for risk in sorted({record["risk"] for record in of_gates}):
        lines += _gate_lines([record for record in of_gates if record["risk"] == risk], risk)
    return "\n".join(lines) + "\n"


def _shared(record: Record) -> tuple[Any, ...]:
    return tuple(record[key] for key in SHARED)


def _name(record: Record) -> str:
    return f"{record['task']}, {record['method']}, seed {record['seed']}"


def _gain_lines(records: Sequence[Record]) -> list[str]:
    title = (
        "AUROC (points) for the mean adapter's errors: the one-pass scores together (cross-fitted "
        "logistic regression on ranks), and what one score more adds, with the 95 % interval over "
        "rows"
    )
    lines = [
        title,
        "",
        f"| posterior | rows, wrong | one pass | {' | '.join(ADDED)} |",
        f"|---|---|---|{'---|' * len(ADDED)}",
    ]
    for record in records:
        cells = [_name(record), f"{record['rows']}, {record['wrong']}"]
        cells.append(f"{100 * record['one_pass']:.1f}")
        for name in ADDED:
            gain = record["gains"][name]
            ends = f"[{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}]"
            cells.append(f"{100 * gain['auroc']:+.1f} {ends}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _control_lines(records: Sequence[Record]) -> list[str]:
    """Means over posteriors of what a score adds, by method, and BLoB's less its control's."""
    by_method: dict[str, list[Record]] = {}
    for record in records:
        by_method.setdefault(record["method"], []).append(record)
    head = ["", "Mean of what is added (points) and its standard error over posteriors", ""]
    head += [f"| | posteriors | {' | '.join(ADDED)} |", f"|---|---|{'---|' * len(ADDED)}"]
    lines = []
    for method, own in by_method.items():
        values = [[100 * record["gains"][name]["auroc"] for name in ADDED] for record in own]
        lines.append(_mean_line(method, values))
    controls = {_shared(record): record for record in by_method.get("noise on MLE", [])}
    values = []
    for record in by_method.get("blob", []):
        other = controls.get(_shared(record))
        if other is not None:
            own = [record["gains"][name]["auroc"] for name in ADDED]
            its = [other["gains"][name]["auroc"] for name in ADDED]
            values.append([100 * (a - b) for a, b in zip(own, its, strict=True)])
    if values:
        lines.append(_mean_line("blob less matched noise on MLE", values))
    return head + lines


def _mean_line(name: str, values: Sequence[Sequence[float]]) -> str:
    numbers = torch.tensor(values, dtype=torch.float64)
    cells = [name, str(len(numbers))]
    for column in numbers.unbind(1):
        error = f" ± {column.std().item() / len(column) ** 0.5:.1f}" if len(column) > 1 else ""
        cells.append(f"{column.mean().item():+.1f}{error}")
    return f"| {' | '.join(cells)} |"


def _gate_lines(records: Sequence[Record], risk: float) -> list[str]:
    names = (*ROW_SCORES, "distance", "prompt_length")
    title = (
        f"Promised risk {risk:g} with confidence {PROMISED:g}: coverage %, and the realised risk % "
        "with its 95 % interval, of rows that nothing was chosen on (–: nothing is acted on; *: "
        "the score that calibration chose)"
    )
    lines = [
        "",
        title,
        "",
        f"| posterior | held-out, new | always act | {' | '.join(names)} |",
        f"|---|---|---|{'---|' * len(names)}",
    ]
    for record in records:
        cells = [_name(record), f"{record['held_out']}, {record['new']}"]
        if "refused" in record:
            cells += ["refused: too few rows", *[""] * len(names)]
        else:
            cells.append(_through(record["always_act"]))
            for name in names:
                mark = "*" if name == record["decides"] else ""
                cells.append(_through(record["scores"][name]) + mark)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _through(found: Record) -> str:
    if found["coverage"] == 0:
        return "–"
    ends = f"[{100 * found['low']:.0f}, {100 * found['high']:.0f}]"
    return f"{100 * found['coverage']:.0f}: {100 * found['risk']:.1f} {ends}"
