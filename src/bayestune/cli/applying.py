"""A calibration in `predict` and `evaluate`: whether it applies, and what it makes of the rows.

Bars of `evaluate --gate` are held against the records here, too.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from bayestune.adapters import detach
from bayestune.data import Question
from bayestune.decisions import Calibration
from bayestune.evaluation import Bar, EvaluationOptions, Result
from bayestune.forward import Draws
from bayestune.posteriors import artefact_folder
from bayestune.runtime import num_processes, shared_work
from bayestune.session import (
    CalibratedPredictor,
    Fit,
    PredictionOptions,
    Session,
    load_way,
    read_calibration,
    windows,
)

logger = logging.getLogger(__name__)

EXIT_BELOW_GATE = 1


def applied_calibration(args: Namespace) -> tuple[Calibration | None, PredictionOptions]:
    """The calibration that `predict` applies, and the way it predicts.

    A calibration applies unless the options ask for other draws or another way than it was made
    with, which is warned of.

    Args:
        args: the options of `predict`.

    Returns:
        The calibration, None if there is none or it does not apply; and its way, or that of the
        options.
    """
    calibration = None if args.uncalibrated else read_calibration(args.posterior)
    given = {}
    for name in ("draws", "draw_seed", "bf16"):
        if args[name] is not None:
            given[name] = args[name]
    if calibration is None:
        return None, PredictionOptions(**given)
    way = PredictionOptions.of(calibration.settings)
    differing = [name for name, value in given.items() if getattr(way, name) != value]
    differing += [name for name in ("shared_prefix", "decided") if args[name]]
    if not differing:
        return calibration, way
    warning = (
        "--%s is not what was calibrated: the calibration is not applied, there is no decision"
    )
    logger.warning(warning, ", --".join(differing))
    return None, PredictionOptions(**given)


def predicted_lines(
    predictor: CalibratedPredictor, rows: Sequence[Question], args: Namespace
) -> Iterator[dict[str, Any]]:
    """The lines of `predict` for some rows.

    Args:
        predictor: with the calibration that applies, if any.
        rows: that can be put to the model.
        args: the options of `predict`, which count where no calibration applies.

    Returns:
        One line a row, in order.
    """
    if predictor.calibration is not None:
        return predictor.answers(rows)
    draws = Draws(predictor.way.draws, predictor.way.draw_seed, shared_prefix=args.shared_prefix)
    return predictor.uncalibrated(rows, draws, decided=args.decided)


def shared_lines(
    rows: Sequence[Question], lines_of: Callable[[Sequence[Question]], Iterable[dict[str, Any]]]
) -> Iterator[dict[str, Any]]:
    """The lines of rows, made by all processes of a launcher, each of which gets all of them.

    A process takes a window of rows at a time. The windows are those of a run in one process, so
    the lines are the same as there.

    Args:
        rows: in the order of the file.
        lines_of: makes the lines of some rows.

    Returns:
        One line a row, in order.
    """
    all_windows = windows(rows)
    for start in range(0, len(all_windows), num_processes()):
        one_each = all_windows[start : start + num_processes()]
        for lines in shared_work(one_each, lambda window: list(lines_of(window))):
            yield from lines


def calibrated_result(
    session: Session, fit: Fit, calibration: Calibration, folder: Path, options: EvaluationOptions
) -> Result:
    """What a calibration makes of the session's rows to evaluate on.

    Args:
        session: with the rows.
        fit: the posterior. If the calibration predicts with a student, it is taken off the model.
        calibration: of the folder.
        folder: of the posterior, or its id on the Hub.
        options: of the evaluation.

    Returns:
        The record under the calibration, and its rows.
    """
    way = PredictionOptions.of(calibration.settings)
    if way.student is not None:
        detach(fit.posterior.model)
        fit = load_way(session, artefact_folder(folder), way)
    return CalibratedPredictor(session, fit, way, calibration).evaluated(options)


def gate_exit_code(bars: Sequence[Bar], results: Sequence[Result]) -> int:
    """Prints for each bar whether it holds.

    Args:
        bars: of `--gate`. They are for the calibrated record if there is one, else for every one.
        results: of this run.

    Returns:
        0, or `EXIT_BELOW_GATE` if a bar does not hold.
    """
    records = [result.record for result in results]
    calibrated = [record for record in records if "calibration" in record]
    code = 0
    for bar in bars:
        for record in calibrated or records:
            print(bar.said(record))
            if not bar.holds(record):
                code = EXIT_BELOW_GATE
    return code
