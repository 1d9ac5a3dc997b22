"""Records and rows → the one JSON object that the page shows: docs/report.md says what is in it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bayestune.metrics import Row
from bayestune.report.claims import COMPARED, Compared, Evaluation, compare, sentence, verdict
from bayestune.report.columns import ECE
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
from bayestune.report.rows import Record, common_texts, row_key

MOST_BYTES = 3_600_000  # of the JSON: with the library the page stays below 5 MB
_METRICS = ("accuracy", "ece", "ece_if_calibrated", "nll", "brier", "aurc")
_FACTS = ("label", "task", "model", "method", "scoring", "rows", "seed", "draws", "n")
_FACTS += ("train_rows", "trained_on", "bins", "binning", "revision", "date", "gate", "predictions")
_DOTS = 600  # of a run's cloud
_ALL_DOTS = 40_000
# tried in turn until the rows fit: the share of rows that keep their draws, the number of rows, and
# characters of an option (of a question ten times as many)
_TRIMS = ((1.0, 20_000, 400), (0.5, 4_000, 200), (0.2, 2_000, 100), (0.0, 1_000, 60))
_TRIMS += ((0.0, 300, 40), (0.0, 100, 20))
Payload = dict[str, Any]


def payload(evaluations: Sequence[Evaluation]) -> Payload:
    """What the page shows of these runs: figures, the numbers behind charts, and rows.

    If the page would be larger than 5 MB, rows are left out; those that a run gets wrong go last.
    Figures and charts are of all rows.
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
    return data | _rows_within(evaluations, MOST_BYTES - _size(data))


def as_json(data: Any) -> str:
    """Compact JSON that stands in a script element as it is: no `<` and no line separators."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _size(data: Any) -> int:
    return len(as_json(data).encode("utf-8", "backslashreplace"))


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
    for index, own in enumerate(records):
        same_rows = [i for i, r in enumerate(records) if _same(own, r, ("task", "rows", "n"))]
        same_model = [i for i in same_rows if _same(own, records[i], ("model",))]
        first = records[same_model[0]]
        of_first_method = [i for i in same_model if _same(first, records[i], ("label",))]
        same_seed = [i for i in of_first_method if _same(own, records[i], ("seed",))]
        base = (same_seed or same_model)[0]
        if base == index and same_model[0] != same_rows[0]:
            others = [i for i in same_rows if not _same(own, records[i], ("model",))]
            same_method = [i for i in others if _same(own, records[i], ("label",))]
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


def _rows_within(evaluations: Sequence[Evaluation], max_bytes: int) -> Payload:
    """Questions and answers in at most so many bytes of JSON: fewer draws, then fewer rows."""
    keyed: dict[tuple[Any, ...], dict[int, Row]] = {}  # a row's key → run → the row in that run
    common = common_texts([evaluation.rows for evaluation in evaluations])
    for index, evaluation in enumerate(evaluations):
        task = evaluation.record.get("task")
        for row in evaluation.rows:
            key = (*row_key(row, common), task, len(row["probabilities"]))
            keyed.setdefault(key, {})[index] = row
    ranked = sorted(keyed.items(), key=lambda item: -_interest(item[1].values()))
    trimmed: Payload = {}
    for share_with_draws, num_rows, characters in _TRIMS:
        kept = ranked[:num_rows]
        trimmed = _rows(kept, round(share_with_draws * len(kept)), characters)
        trimmed["left_out"] = len(ranked) - len(kept)
        if _size(trimmed) <= max_bytes:
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
    keyed: Sequence[tuple[tuple[Any, ...], Mapping[int, Row]]], with_draws: int, characters: int
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
