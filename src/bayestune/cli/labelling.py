"""`calibrate`, `rank` and `drift`: held-out rows, rows to label, and rows that may be different."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from torch import Tensor

from bayestune import session
from bayestune.cli.answers import LineWriter, new_output_file, readable_file
from bayestune.cli.options import build
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
    read_calibration,
    reference_of_artefact,
    rows_for_artefact,
)
from bayestune.whole_files import write_json_lines

logger = logging.getLogger(__name__)

EXIT_DRIFT = 1
_SIMULATIONS = 100  # of the false alarms
_MOST_ODD_ROWS = 10  # that are printed
# the scores that are compared if none are named, beside the one that decides
_USUAL_SCORES = ("total_entropy", "corrected_mutual_information", PROMPT_LENGTH, DISTANCE)


def calibrate(args: Namespace) -> None:
    """Chooses on held-out rows how an artefact predicts, and when one may act on it."""
    place = artefact_folder(args.posterior)
    check_writable(place)
    costs = _costs(args.costs) if args.costs else None
    bands = dict(args.bands) or None
    promise = Promise(args.risk, args.confidence)
    options = build(CalibrationOptions, args, promise=promise, costs=costs, bands=bands)
    compared = build(VariantOptions, args)
    row_options = build(RowOptions, args)
    calibration = session.calibrate(place, args.rows, options, compared, row_options, args.model)
    print(render([variant_table(calibration)]))
    print()
    print(promises(calibration))
    if args.trained_on is None:
        print("Without --trained_on FILE, the training rows, there is no distance from them.")
    print(f"calibration in {place / FILE_NAME}")


def _costs(rows: Sequence[Sequence[float]]) -> Tensor:
    """Costs (C, choices): one row for each right answer."""
    lengths = [len(row) for row in rows]
    if len(set(lengths)) > 1:
        raise Refusal(
            f"got costs in rows of {lengths} numbers; expected as many in each, one for each choice"
            "; give a row for each right answer, such as '[[0, 1], [5, 0]]'"
        )
    return torch.tensor(rows, dtype=torch.float64)


def rank(args: Namespace) -> None:
    """Ranks unlabelled rows: which to label next."""
    output = new_output_file(args)
    calibration = read_calibration(args.posterior)
    row_options: RowOptions | None = build(RowOptions, args)
    row_options.check(artefact_folder(args.posterior), calibrated=calibration is not None)
    if calibration is not None and is_plain(args.posterior):
        row_options = None  # its calibration says how rows are put
    with readable_file(args.rows) as file:
        rows = rows_for_artefact(
            file, args.posterior, row_options, labelled=False, columns=args.columns
        )
    artefact = Artefact.open(args.posterior, rows, row_options, args.model)
    rows = artefact.rows
    bf16 = artefact.fit.bf16 if args.bf16 is None else args.bf16
    way = PredictionOptions(args.draws, args.draw_seed, bf16)
    draws = max(1, count_for(artefact.fit.posterior, args.draws))
    by = args.by or usual_acquisition(draws)
    number = len(rows) if args.number is None else args.number
    check_ranking(number, by, draws, len(rows), max(len(row.options) for row in rows))
    outputs = artefact.predictor(way, reference_of_artefact(calibration)).over(rows, shared=True)
    features = _spread_activations(artefact, way) if by == "bald" else None
    contents = [row.fingerprint for row in rows]
    order = rank_rows(outputs.logits, number, by, features, args.draw_seed, contents)
    scores = score_rows(outputs.logits) | dict(outputs.extra)
    repeated_fields = []
    for row in rows:
        repeated_fields.append(
            {
                "id": row.id,
                "question": row.question,
                "options": list(row.options),
                "context": row.context,
            }
        )
    lines = ranked_lines(order, repeated_fields, by, scores)
    if is_first_process():
        _write_lines(lines, output)


def _spread_activations(artefact: Artefact, way: PredictionOptions) -> Tensor | None:
    """The rows' activations of the adapter; None if the rows are all alike or it has no mean."""
    if not artefact.fit.posterior.has_mean or len(artefact.rows) < 2:
        return None
    return spread_out(artefact.predictor(way).activations(artefact.rows, shared=True))


def _write_lines(lines: Sequence[Mapping[str, Any]], path: Path | None) -> None:
    """Writes a file whole, or to standard output."""
    if path is not None:
        write_json_lines(path, lines)
        return
    with LineWriter(None) as writer:
        for line in lines:
            writer.write(line)


def drift(args: Namespace) -> int:
    """Compares new rows with the held-out rows of a calibration.

    Returns:
        The exit code: `EXIT_DRIFT` if the rows differ.
    """
    output = new_output_file(args)
    place = artefact_folder(args.posterior)
    calibration = read_calibration(place)
    if calibration is None:
        raise Refusal(
            f"{args.posterior} has no calibration, whose held-out rows new ones are compared with: "
            "expected one; run `bayestune calibrate` first"
        )
    if args.level not in INNER_PART:
        raise Refusal(f"got level={args.level}; expected {INNER_PART.said}; 0.05 is customary")
    held_out = _held_out_scores(calibration, args.scores)
    permutations = permutations_for(args.level, len(held_out))
    with readable_file(args.rows) as file:
        rows = _distinct(
            rows_for_artefact(file, args.posterior, labelled=False, columns=args.columns)
        )
    way = PredictionOptions.of(calibration.settings)
    artefact = Artefact.open(args.posterior, rows, None, args.model, way)
    outputs = artefact.predictor(way, kept_reference(calibration)).over(artefact.rows)
    scores = score_rows(outputs.logits, temperature=calibration.temperature) | dict(outputs.extra)
    new = as_kept({name: scores[name] for name in held_out})  # rounded as those of the calibration
    test = drift_test(held_out, _as_tensors(new), permutations)
    num_held_out = len(next(iter(held_out.values())))
    size = min(len(rows), num_held_out // 2)
    alarms = false_alarm_rate(held_out, size, args.level, _SIMULATIONS)
    differs = test.p_value <= args.level
    report = _figures(test, artefact.rows) | {"level": args.level, "differs": differs}
    report |= {"false_alarm_rate": alarms, "false_alarms_of": size}
    _print_report(report)
    if output is not None:
        write_json_lines(output, [report])
    return EXIT_DRIFT if differs else 0


def _distinct(rows: Sequence[Question]) -> tuple[Question, ...]:
    """The first row of each content, with a warning of the others: copies are no evidence."""
    first: dict[str, Question] = {}
    for row in rows:
        first.setdefault(row.fingerprint, row)
    num_copies = len(rows) - len(first)
    if num_copies:
        warning = "%d of %d rows repeat the content of others: each content counts once"
        logger.warning(warning, num_copies, len(rows))
    return tuple(first.values())


def _held_out_scores(calibration: Calibration, names: Sequence[str]) -> dict[str, Tensor]:
    """The scores of a calibration's held-out rows: those of these names, or else the usual ones."""
    kept = calibration.held_out
    unknown = set(names) - set(kept)
    if unknown:
        raise Refusal(f"got the score {min(unknown)!r}; expected some of {[*kept]}; choose those")
    usual = (calibration.score, *_USUAL_SCORES)
    chosen = [name for name in dict.fromkeys(names or usual) if name in kept]
    return _as_tensors({name: kept[name] for name in chosen})


def _as_tensors(scores: Mapping[str, Sequence[float]]) -> dict[str, Tensor]:
    """Scores (N,) by name."""
    tensors = {}
    for name, numbers in scores.items():
        tensors[name] = torch.tensor(list(numbers), dtype=torch.float64)
    return tensors


def _figures(test: Drift, rows: Sequence[Question]) -> dict[str, Any]:
    """The figures of a test, with the rows that stick out."""
    odd = []
    for index in test.odd:
        odd.append({"id": rows[index].id, "p_value": test.row_p_values[index].item()})
    return {
        "rows": len(rows),
        "p_value": test.p_value,
        "distances": test.statistics,
        "p_values": test.p_values,
        "odd": odd,
    }


def _print_report(report: Mapping[str, Any]) -> None:
    verdict = "differ from" if report["differs"] else "are not told from"
    print(f"The {report['rows']} rows {verdict} the held-out ones: p = {report['p_value']:.3g}.")
    for name, distance in report["distances"].items():
        print(f"  {name}: distance {distance:.3f}, p = {report['p_values'][name]:.3g}")
    print(
        f"At the level {report['level']:g}, {report['false_alarms_of']} held-out rows differ from "
        f"the others in {report['false_alarm_rate']:.0%} of {_SIMULATIONS} simulations."
    )
    for row in report["odd"][:_MOST_ODD_ROWS]:
        print(f"  sticks out: {row['id']}, p = {row['p_value']:.3g}")
