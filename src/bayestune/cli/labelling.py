"""`calibrate`, `rank` and `drift`: what held-out rows promise, what to label next, what is new."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from torch import Tensor

from bayestune import session
from bayestune.cli.answers import LineWriter, readable, refuse_input
from bayestune.cli.options import built
from bayestune.cli.output_folder import check_writable
from bayestune.data import Question
from bayestune.decisions import (
    FILE_NAME,
    Calibration,
    CalibrationOptions,
    Drift,
    Promise,
    as_kept,
    check_ranking,
    drift_test,
    false_alarm_rate,
    permutations_for,
    rank_rows,
    ranked_lines,
    score_rows,
    spread_out,
    usual_acquisition,
)
from bayestune.errors import INNER_PART, Refusal
from bayestune.posteriors import artefact_folder, count_for
from bayestune.report import promises, render, variant_table
from bayestune.runtime import is_first_process
from bayestune.session import (
    DISTANCE,
    PROMPT_LENGTH,
    Artefact,
    PredictionOptions,
    RowOptions,
    VariantOptions,
    is_plain,
    kept_reference,
    own_reference,
    read_calibration,
    rows_of,
)
from bayestune.whole_files import write_json_lines

logger = logging.getLogger(__name__)

_LEAST_ALARMS = 100  # repetitions of the simulated false alarms
_SHOWN = 10
_BESIDE = (PROMPT_LENGTH, DISTANCE)
EXIT_DRIFT = 1


def calibrate(o: Namespace) -> None:
    """Chooses on held-out rows how an artefact predicts, and when one may act on it."""
    place = artefact_folder(o.posterior)
    check_writable(place)
    costs = _costs(o.costs) if o.costs else None
    bands = dict(o.bands) or None
    promise = Promise(o.risk, o.confidence)
    options = built(CalibrationOptions, o, promise=promise, costs=costs, bands=bands)
    compared = built(VariantOptions, o)
    found = session.calibrate(place, o.rows, options, compared, built(RowOptions, o), o.model)
    print(render([variant_table(found)]))
    print()
    print(promises(found))
    if o.trained_on is None:
        print("Without --trained_on FILE, the training rows, there is no distance from them.")
    print(f"calibration in {place / FILE_NAME}")


def _costs(rows: Sequence[Sequence[float]]) -> Tensor:
    lengths = [len(row) for row in rows]
    if len(set(lengths)) > 1:
        raise Refusal(
            f"got costs in rows of {lengths} numbers; expected as many in each, one for each choice"
            "; give a row for each right answer, such as '[[0, 1], [5, 0]]'"
        )
    return torch.tensor(rows, dtype=torch.float64)


def rank(o: Namespace) -> None:
    """Ranks unlabelled rows: which to label next."""
    output = new_file(o)
    calibration = read_calibration(o.posterior)
    row_options: RowOptions | None = built(RowOptions, o)
    row_options.check(artefact_folder(o.posterior), calibrated=calibration is not None)
    if calibration is not None and is_plain(o.posterior):
        row_options = None  # its calibration says how rows are put
    with readable(o.rows) as file:
        rows = rows_of(file, o.posterior, row_options, labelled=False, columns=o.columns)
    artefact = Artefact.open(o.posterior, rows, row_options, o.model)
    rows = artefact.rows
    bf16 = artefact.fit.bf16 if o.bf16 is None else o.bf16
    way = PredictionOptions(o.draws, o.draw_seed, bf16)
    draws = max(1, count_for(artefact.fit.posterior, o.draws))
    by = o.by or usual_acquisition(draws)
    number = len(rows) if o.number is None else o.number
    check_ranking(number, by, draws, len(rows), max(len(row.options) for row in rows))
    outputs = artefact.predictor(way, own_reference(calibration)).over(rows, shared=True)
    near = _places(artefact, way) if by == "bald" else None
    same = [row.fingerprint for row in rows]
    order = rank_rows(outputs.logits, number, by, near, o.draw_seed, same)
    scores = score_rows(outputs.logits) | dict(outputs.extra)
    shown = []
    for row in rows:
        own = {"id": row.id, "question": row.question}
        shown.append({**own, "options": list(row.options), "context": row.context})
    lines = ranked_lines(order, shown, by, scores)
    if is_first_process():
        _write(lines, output)


def _places(artefact: Artefact, way: PredictionOptions) -> Tensor | None:
    """Where the rows lie in the adapter's activations; None if all are alike or it has no mean."""
    if not artefact.fit.posterior.has_mean or len(artefact.rows) < 2:
        return None
    return spread_out(artefact.predictor(way).activations(artefact.rows, shared=True))


def drift(o: Namespace) -> int:
    """Compares new rows with the held-out rows of a calibration."""
    output = new_file(o)
    place = artefact_folder(o.posterior)
    calibration = read_calibration(place)
    if calibration is None:
        raise Refusal(
            f"{o.posterior} has no calibration, whose held-out rows new ones are compared with: "
            "expected one; run `bayestune calibrate` first"
        )
    if o.level not in INNER_PART:
        raise Refusal(f"got level={o.level}; expected {INNER_PART.said}; 0.05 is customary")
    held_out = _compared(calibration, o.scores)
    permutations = permutations_for(o.level, len(held_out))
    with readable(o.rows) as file:
        rows = _once_each(rows_of(file, o.posterior, labelled=False, columns=o.columns))
    way = PredictionOptions.of(calibration.settings)
    artefact = Artefact.open(o.posterior, rows, None, o.model, way)
    outputs = artefact.predictor(way, kept_reference(calibration)).over(artefact.rows)
    scores = score_rows(outputs.logits, temperature=calibration.temperature) | dict(outputs.extra)
    new = as_kept({name: scores[name] for name in held_out})
    found = drift_test(held_out, _numbers(new), permutations)
    size = min(len(rows), len(next(iter(held_out.values()))) // 2)
    alarms = false_alarm_rate(held_out, size, o.level, _LEAST_ALARMS)
    differs = found.p_value <= o.level
    report = _report_of(found, artefact.rows) | {"level": o.level, "differs": differs}
    report |= {"false_alarm_rate": alarms, "false_alarms_of": size}
    _say(report)
    if output is not None:
        write_json_lines(output, [report])
    return EXIT_DRIFT if differs else 0


def _once_each(rows: Sequence[Question]) -> tuple[Question, ...]:
    """The rows, of those that are the same the first one: copies are no further evidence."""
    first: dict[str, Question] = {}
    for row in rows:
        first.setdefault(row.fingerprint, row)
    if repeated := len(rows) - len(first):
        said = "%d of %d rows repeat the content of others: each content counts once"
        logger.warning(said, repeated, len(rows))
    return tuple(first.values())


def _compared(calibration: Calibration, names: Sequence[str]) -> dict[str, Tensor]:
    """The held-out scores to compare: the one that decides, and others that say something else."""
    kept = calibration.held_out
    unknown = set(names) - set(kept)
    if unknown:
        raise Refusal(f"got the score {min(unknown)!r}; expected some of {[*kept]}; choose those")
    few = (calibration.score, "total_entropy", "corrected_mutual_information", *_BESIDE)
    chosen = [name for name in dict.fromkeys(names or few) if name in kept]
    return _numbers({name: kept[name] for name in chosen})


def _numbers(scores: Mapping[str, Sequence[float]]) -> dict[str, Tensor]:
    return {name: torch.tensor(list(own), dtype=torch.float64) for name, own in scores.items()}


def _report_of(found: Drift, rows: Sequence[Question]) -> dict[str, Any]:
    odd = [{"id": rows[i].id, "p_value": found.row_p_values[i].item()} for i in found.odd]
    return {
        "rows": len(rows),
        "p_value": found.p_value,
        "distances": found.statistics,
        "p_values": found.p_values,
        "odd": odd,
    }


def _say(report: Mapping[str, Any]) -> None:
    verdict = "differ from" if report["differs"] else "are not told from"
    print(f"The {report['rows']} rows {verdict} the held-out ones: p = {report['p_value']:.3g}.")
    for name, distance in report["distances"].items():
        print(f"  {name}: distance {distance:.3f}, p = {report['p_values'][name]:.3g}")
    print(
        f"At the level {report['level']:g}, {report['false_alarms_of']} held-out rows differ from "
        f"the others in {report['false_alarm_rate']:.0%} of {_LEAST_ALARMS} simulations."
    )
    for row in report["odd"][:_SHOWN]:
        print(f"  sticks out: {row['id']}, p = {row['p_value']:.3g}")


def new_file(o: Namespace) -> Path | None:
    """The output file; refused before any work if it is there or cannot be written."""
    path: Path | None = o.output
    if path is None or not is_first_process():
        return path
    refuse_input(path, o)
    if path.exists() and not o.overwrite:
        advice = "choose another --output, or give --overwrite"
        raise FileExistsError(f"{path} is there already: {advice}")
    check_writable(path.absolute().parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _write(lines: Sequence[Mapping[str, Any]], path: Path | None) -> None:
    if path is not None:
        write_json_lines(path, lines)
        return
    with LineWriter(None) as writer:
        for line in lines:
            writer.write(line)
