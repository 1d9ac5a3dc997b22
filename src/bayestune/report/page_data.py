"""Records and rows → the one JSON object that the page shows: docs/report.md says what is in it."""

from collections.abc import Mapping, Sequence
from typing import Any

from bayestune.metrics import Row
from bayestune.report.claims import COMPARED, Compared, Evaluation, compare, sentence, verdict
from bayestune.report.columns import ECE
from bayestune.report.page_json import Payload, json_bytes
from bayestune.report.page_rows import rows_within
from bayestune.report.panels import (
    Numbers,
    by_draws,
    classes,
    cloud,
    coverage_curve,
    histograms,
    reliability_bins,
    shift_between,
    short,
)
from bayestune.report.rows import Record

MOST_BYTES = 3_600_000  # of the JSON: with the library the page stays below 5 MB
_METRICS = ("accuracy", "ece", "ece_if_calibrated", "nll", "brier", "aurc")
_FACTS = ("label", "task", "model", "method", "scoring", "rows", "seed", "draws", "n")
_FACTS += ("train_rows", "trained_on", "bins", "binning", "revision", "date", "gate", "predictions")
_DOTS = 600  # of a run's cloud
_ALL_DOTS = 40_000


def payload(evaluations: Sequence[Evaluation]) -> Payload:
    """What the page shows of these runs: figures, the numbers behind charts, and rows.

    If the page would be larger than 5 MB, rows are left out; those that a run gets wrong go last.
    Figures and charts are of all rows.

    Args:
        evaluations: the runs, in the order of the page.

    Returns:
        `words`, `runs`, `fits` and `shifts`, and what `rows_within` returns.
    """
    dots = min(_DOTS, _ALL_DOTS // len(evaluations))
    runs = [_run(evaluation, dots) for evaluation in evaluations]
    words = []
    for index, base in enumerate(_baselines(evaluations)):
        evaluation = evaluations[index]
        runs[index]["base"] = base
        if base == index:
            words.append(evaluation.opening())
            continue
        compared = compare(evaluations[base], evaluation)
        runs[index]["paired"] = _paired(compared)
        words.append(sentence(evaluations[base], evaluation, compared))
    data = {"words": words, "runs": runs}
    data |= {"fits": _fits(evaluations), "shifts": _shifts(evaluations)}
    return data | rows_within(evaluations, MOST_BYTES - json_bytes(data))


def _run(evaluation: Evaluation, dots: int) -> Payload:
    """What is shown of one run: facts, metrics, cost, settings, its fit and its charts."""
    record = evaluation.record
    run: Payload = {"name": evaluation.name, "metrics": {}}
    run |= {key: record[key] for key in _FACTS if record.get(key) is not None}
    metrics = record.get("metrics", {})
    for key in _METRICS:
        metric = dict(metrics.get(key) or {})
        if key == "ece" and ECE.interval(record) is None:
            metric |= {"low": None, "high": None}
        parts = [metric.get(part) for part in ("value", "low", "high", "p_value")]
        if parts[0] is not None:
            run["metrics"][key] = [short(part, 8) for part in parts]
    run["cost"] = _cost(record)
    run["settings"] = _finite({key: record.get(key) for key in ("config", "versions")})
    if record.get("fit"):
        run["fit"] = _fit_log(record)
    if evaluation.rows:
        run |= _charts(evaluation.rows, record, dots)
    return run


def _charts(rows: Sequence[Row], record: Record, dots: int) -> Payload:
    return {
        "reliability": reliability_bins(rows, record.get("bins", 15)),
        "coverage": coverage_curve(rows),
        "histograms": histograms(rows),
        "cloud": cloud(rows, dots),
        "classes": classes(rows),
    }


def _cost(record: Record) -> Payload:
    """Seconds of fit and prediction, passes and milliseconds for a row, and peak memory in MB."""
    seconds = record.get("seconds") or {}
    draws = record.get("draws") or 0
    timed = record.get("timed_draws") or draws
    n = record.get("n")
    cost = {"fit": seconds.get("fit"), "predict": seconds.get("predict"), "passes": max(draws, 1)}
    if seconds.get("predict") is not None and n:
        share = max(draws, 1) / max(timed, 1)  # these draws were the first of a pass with more
        cost["ms"] = short(1000 * seconds["predict"] / n * share, 2)
    return cost | {"memory": record.get("peak_memory_mb")}


def _fit_log(record: Record) -> Payload:
    """σ/σ_p (σ where no prior is known) of each slot, and the lines of the fit's log."""
    fit = record["fit"]
    prior = fit.get("prior_std")
    stds = {name: short(std / (prior or 1), 5) for name, std in (fit.get("std") or {}).items()}
    history = [_finite(line) for line in fit.get("history") or ()]
    return {"slots": list(stds.items()), "prior_std": prior, "history": history}


def _finite(value: Any) -> Any:
    """A value with None for every number that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    if isinstance(value, float):
        return short(value, 6) if abs(value) < 1e6 else short(value)
    return value


def _same(one: Record, other: Record, keys: Sequence[str]) -> bool:
    return all(one.get(key) == other.get(key) for key in keys)


def _baselines(evaluations: Sequence[Evaluation]) -> list[int]:
    """For each run the index of the run that it is compared with; a run's own index for none.

    It is the first one on the same rows and model, but of the run's own seed if that has one of the
    first one's method. Where that is the run itself, and another model came first, it is the first
    run of another model, of the run's own method if there is one.
    """
    records = [evaluation.record for evaluation in evaluations]
    baselines = []
    for index, record in enumerate(records):
        every = range(len(records))
        same_rows = [i for i in every if _same(record, records[i], ("task", "rows", "n"))]
        same_model = [i for i in same_rows if _same(record, records[i], ("model",))]
        first = records[same_model[0]]
        of_first_method = [i for i in same_model if _same(first, records[i], ("label",))]
        same_seed = [i for i in of_first_method if _same(record, records[i], ("seed",))]
        base = (same_seed or same_model)[0]
        if base == index and same_model[0] != same_rows[0]:
            others = [i for i in same_rows if not _same(record, records[i], ("model",))]
            same_method = [i for i in others if _same(record, records[i], ("label",))]
            base = (same_method or others)[0]
        baselines.append(base)
    return baselines


def _paired(compared: Compared) -> Payload | str:
    """Difference, interval, p-value and verdict by metric, or why there are none."""
    if isinstance(compared, str):
        return compared
    by_metric: Payload = {}
    for column in COMPARED:
        paired = compared[column]
        figures = (paired.difference, paired.low, paired.high, paired.p_value)
        rounded = [short(figure, 5) for figure in figures]
        by_metric[column.key] = [*rounded, verdict(column, paired)]
        by_metric["n"] = paired.n
    return by_metric


def _fits(evaluations: Sequence[Evaluation]) -> list[Payload]:
    """Fits evaluated with several numbers of draws, or whose rows keep several draws."""
    keys = ("task", "model", "method", "name", "seed", "scoring", "rows", "n", "config")
    groups: list[list[int]] = []
    for index, evaluation in enumerate(evaluations):
        if "calibration" in evaluation.record:
            continue
        for group in groups:
            if _same(evaluations[group[0]].record, evaluation.record, keys):
                group.append(index)
                break
        else:
            groups.append([index])
    fits = []
    for group in groups:
        runs = sorted(group, key=lambda index: evaluations[index].record.get("draws") or 0)
        last = evaluations[runs[-1]]
        prefixes = by_draws(last.rows) if last.rows else []
        if len(runs) > 1 or len(prefixes) > 1:
            fits.append({"name": _name_of_fit(last), "runs": runs, "prefixes": prefixes})
    return fits


def _name_of_fit(evaluation: Evaluation) -> str:
    """The evaluation's name with its label, which says how many draws, replaced by the method."""
    record = evaluation.record
    label = str(record.get("label", ""))
    return evaluation.name.replace(label, str(record.get("name") or record.get("method")), 1)


def _shifts(evaluations: Sequence[Evaluation]) -> list[Payload]:
    """Runs of one fit on the task it was trained on and on another, with the AUROC of scores."""
    keys = ("model", "method", "label", "seed", "draws", "trained_on")
    shifts = []
    for familiar, one in enumerate(evaluations):
        source = one.record.get("trained_on")
        if source is None or source != one.record.get("task") or not one.rows:
            continue
        for shifted, other in enumerate(evaluations):
            same_fit = other.rows and _same(one.record, other.record, keys)
            if same_fit and other.record.get("task") != source:
                auroc: Numbers = shift_between(other.rows, one.rows)
                shifts.append({"familiar": familiar, "shifted": shifted, "auroc": auroc})
    return shifts
