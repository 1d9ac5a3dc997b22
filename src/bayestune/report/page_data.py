"""Records and rows → the one JSON object that the page shows: docs/report.md says what is in it."""

import json
from collections.abc import Mapping, Sequence
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
# the share of rows with draws, rows, and characters of an option (of a question ten times as many)
_TRIMS = ((1.0, 20_000, 400), (0.5, 4_000, 200), (0.2, 2_000, 100), (0.0, 1_000, 60))
_TRIMS += ((0.0, 300, 40), (0.0, 100, 20))
Payload = dict[str, Any]


def payload(evaluations: Sequence[Evaluation]) -> Payload:
    """What the page shows of these runs: figures, what is behind charts, and rows.

    Rows that would make the page larger than 5 MB are left out, the last those that a run gets
    wrong; figures and charts are of all rows.
    """
    dots = min(_DOTS, _ALL_DOTS // len(evaluations))
    runs = [_run(one, dots) for one in evaluations]
    words = []
    for index, base in enumerate(_baselines(evaluations)):
        own = evaluations[index]
        runs[index]["base"] = base
        if base == index:
            words.append(own.opening())
            continue
        compared = compare(evaluations[base], own)
        runs[index]["paired"] = _paired(compared)
        words.append(sentence(evaluations[base], own, compared))
    data = {"words": words, "runs": runs}
    data |= {"fits": _fits(evaluations), "shifts": _shifts(evaluations)}
    return data | _fitting(evaluations, MOST_BYTES - _size(data))


def as_json(data: Any) -> str:
    """Compact JSON that stands in a script element as it is: no `<` and no line separators."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _size(data: Any) -> int:
    return len(as_json(data).encode("utf-8", "backslashreplace"))


def _run(one: Evaluation, dots: int) -> Payload:
    record = one.record
    found: Payload = {"name": one.name, "metrics": {}}
    found |= {key: record[key] for key in _FACTS if record.get(key) is not None}
    known = record.get("metrics", {})
    for key in _METRICS:
        ends = {"low": None, "high": None} if key == "ece" and ECE.interval(record) is None else {}
        metric = {**(known.get(key) or {}), **ends}
        parts = [metric.get(part) for part in ("value", "low", "high", "p_value")]
        if parts[0] is not None:
            found["metrics"][key] = [short(part, 8) for part in parts]
    found["cost"] = _cost(record)
    found["settings"] = _finite({key: record.get(key) for key in ("config", "versions")})
    found |= {"fit": _course(record)} if record.get("fit") else {}
    return found | (_charts(one.rows, record, dots) if one.rows else {})


def _charts(rows: Sequence[Row], record: Record, dots: int) -> Payload:
    return {
        "reliability": reliability_bins(rows, record.get("bins", 15)),
        "coverage": coverage_curve(rows),
        "histograms": histograms(rows),
        "cloud": cloud(rows, dots),
        "classes": classes(rows),
    }


def _cost(record: Record) -> Payload:
    """Milliseconds of a decision and passes over its row; seconds and memory of the whole."""
    seconds = record.get("seconds") or {}
    draws = record.get("draws") or 0
    timed = record.get("timed_draws") or draws
    n = record.get("n")
    found = {"fit": seconds.get("fit"), "predict": seconds.get("predict"), "passes": max(draws, 1)}
    if seconds.get("predict") is not None and n:
        share = max(draws, 1) / max(timed, 1)  # the draws were taken with those of a larger number
        found["ms"] = short(1000 * seconds["predict"] / n * share, 2)
    return found | {"memory": record.get("peak_memory_mb")}


def _course(record: Record) -> Payload:
    """σ/σ_p (σ where no prior is known) of each slot, and the log's lines."""
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
    """The run that each is compared with: the first of its rows and model, of its seed if it can.

    The first of another model is compared with the first of all, of its own method if it can.
    """
    records = [one.record for one in evaluations]
    found = []
    for index, own in enumerate(records):
        alike = [i for i, r in enumerate(records) if _same(own, r, ("task", "rows", "n"))]
        models = [i for i in alike if _same(own, records[i], ("model",))]
        first = records[models[0]]
        twins = [i for i in models if _same(first, records[i], ("label",))]
        seeds = [i for i in twins if _same(own, records[i], ("seed",))]
        base = (seeds or models)[0]
        if base == index and models[0] != alike[0]:
            others = [i for i in alike if not _same(own, records[i], ("model",))]
            base = ([i for i in others if _same(own, records[i], ("label",))] or others)[0]
        found.append(base)
    return found


def _paired(compared: Compared) -> Payload | str:
    """Difference, interval, p-value and verdict by metric, or why there are none."""
    if isinstance(compared, str):
        return compared
    found: Payload = {}
    for column in COMPARED:
        one = compared[column]
        figures = [short(part, 5) for part in (one.difference, one.low, one.high, one.p_value)]
        found[column.key] = [*figures, verdict(column, one)]
        found["n"] = one.n
    return found


def _fits(evaluations: Sequence[Evaluation]) -> list[Payload]:
    """Fits that were evaluated with several numbers of draws: their runs, and prefixes of draws."""
    keys = ("task", "model", "method", "name", "seed", "scoring", "rows", "n", "config")
    groups: list[list[int]] = []
    for index, one in enumerate(evaluations):
        if "calibration" in one.record:
            continue
        for group in groups:
            if _same(evaluations[group[0]].record, one.record, keys):
                group.append(index)
                break
        else:
            groups.append([index])
    found = []
    for group in groups:
        runs = sorted(group, key=lambda index: evaluations[index].record.get("draws") or 0)
        last = evaluations[runs[-1]]
        prefixes = by_draws(last.rows) if last.rows else []
        if len(runs) > 1 or len(prefixes) > 1:
            found.append({"name": _name_of_fit(last), "runs": runs, "prefixes": prefixes})
    return found


def _name_of_fit(one: Evaluation) -> str:
    label = str(one.record.get("label", ""))
    return one.name.replace(label, str(one.record.get("name") or one.record.get("method")), 1)


def _shifts(evaluations: Sequence[Evaluation]) -> list[Payload]:
    """Runs of one fit on the task it was trained on and on another, with the AUROC of scores."""
    keys = ("model", "method", "label", "seed", "draws", "trained_on")
    found = []
    for familiar, one in enumerate(evaluations):
        source = one.record.get("trained_on")
        if source is None or source != one.record.get("task") or not one.rows:
            continue
        for shifted, other in enumerate(evaluations):
            alike = other.rows and _same(one.record, other.record, keys)
            if alike and other.record.get("task") != source:
                auroc: Numbers = shift_between(other.rows, one.rows)
                found.append({"familiar": familiar, "shifted": shifted, "auroc": auroc})
    return found


# Rows


def _fitting(evaluations: Sequence[Evaluation], most: int) -> Payload:
    """Questions and answers in at most so many bytes of JSON: fewer draws, then fewer rows."""
    keyed: dict[tuple[Any, ...], dict[int, Row]] = {}
    common = common_texts([one.rows for one in evaluations])
    for index, one in enumerate(evaluations):
        for row in one.rows:
            key = (*row_key(row, common), one.record.get("task"), len(row["probabilities"]))
            keyed.setdefault(key, {})[index] = row
    ranked = sorted(keyed.items(), key=lambda item: -_interest(item[1].values()))
    found: Payload = {}
    for with_draws, num_rows, texts in _TRIMS:
        kept = ranked[:num_rows]
        found = _rows(kept, round(with_draws * len(kept)), texts)
        found["left_out"] = len(ranked) - len(kept)
        if _size(found) <= most:
            break
    return found


def _interest(rows: Any) -> float:
    """More for a row that some run gets wrong, the more the surer it is."""
    worst = 0.0
    for row in rows:
        wrong = max(row["probabilities"]) > row["probabilities"][row["answer"]]
        worst = max(worst, row["confidence"] + 1 if wrong else 1 - row["confidence"])
    return worst


def _rows(
    keyed: Sequence[tuple[tuple[Any, ...], Mapping[int, Row]]], with_draws: int, texts: int
) -> Payload:
    """Questions once, and of each run its answers to them, in units of a ten-thousandth."""
    questions = []
    answers: dict[int, list[list[Any]]] = {}
    for place, (key, runs) in enumerate(keyed):
        shown = next((row for row in runs.values() if row.get("question")), {})
        name, answer, *_ = key
        question = {"id": str(name), "answer": answer}
        for name in ("question", "context"):
            question |= {name: _cut(str(shown[name]), 10 * texts)} if shown.get(name) else {}
        if shown.get("options"):
            question["options"] = [_cut(str(option), texts) for option in shown["options"]]
        questions.append(question)
        for index, row in runs.items():
            answers.setdefault(index, []).append(_answer(place, row, place < with_draws))
    return {"questions": questions, "answers": {str(i): answers[i] for i in sorted(answers)}}


def _answer(place: int, row: Row, with_draws: bool) -> list[Any]:
    """Place of the question, probabilities, entropies, decision, set, draws: see docs/report.md."""
    entropies = ("total_entropy", "expected_entropy", "mutual_information")
    drawn = [_units(one) for one in row.get("drawn") or ()] if with_draws else []
    return [
        place,
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
