"""A calibration in `predict` and `evaluate`: which one applies, and what it makes of the rows."""

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


def chosen_way(o: Namespace) -> tuple[Calibration | None, PredictionOptions]:
    """The calibration that applies to these options, and how to predict.

    It applies unless the user asks for other draws or another way than was calibrated.
    """
    calibration = None if o.uncalibrated else read_calibration(o.posterior)
    given = {"draws": o.draws, "draw_seed": o.draw_seed, "bf16": o.bf16}
    given = {name: value for name, value in given.items() if value is not None}
    if calibration is None:
        return None, PredictionOptions(**given)
    way = PredictionOptions.of(calibration.settings)
    differ = [name for name, value in given.items() if getattr(way, name) != value]
    differ += [name for name in ("shared_prefix", "decided") if o[name]]
    if not differ:
        return calibration, way
    said = "--%s is not what was calibrated: the calibration is not applied, there is no decision"
    logger.warning(said, ", --".join(differ))
    return None, PredictionOptions(**given)


def answered(
    predictor: CalibratedPredictor, rows: Sequence[Question], o: Namespace
) -> Iterator[dict[str, Any]]:
    """The lines of `predict` for some rows."""
    if predictor.calibration is not None:
        return predictor.answers(rows)
    draws = Draws(predictor.way.draws, predictor.way.draw_seed, shared_prefix=o.shared_prefix)
    return predictor.uncalibrated(rows, draws, decided=o.decided)


def in_shares(
    rows: Sequence[Question], tell: Callable[[Sequence[Question]], Iterable[dict[str, Any]]]
) -> Iterator[dict[str, Any]]:
    """The lines that `tell` makes of rows, in order: processes take a window each, all get all.

    The windows are those of one process, so the lines are, too.
    """
    parts = windows(rows)
    for start in range(0, len(parts), num_processes()):
        some = parts[start : start + num_processes()]
        for lines in shared_work(some, lambda part: list(tell(part))):
            yield from lines


def calibrated_result(
    session: Session, fit: Fit, calibration: Calibration, folder: Path, options: EvaluationOptions
) -> Result:
    """What a calibration makes of the session's rows; a student takes the posterior's place."""
    way = PredictionOptions.of(calibration.settings)
    if way.student is not None:
        detach(fit.posterior.model)
        fit = load_way(session, artefact_folder(folder), way)
    return CalibratedPredictor(session, fit, way, calibration).evaluated(options)


def passed(bars: Sequence[Bar], results: Sequence[Result]) -> int:
    """Says of each bar whether it holds; 1 if one does not.

    Bars are for the calibrated record if there is one, for every record of this run if not.
    """
    records = [result.record for result in results]
    records = [record for record in records if "calibration" in record] or records
    code = 0
    for bar in bars:
        for record in records:
            print(bar.said(record))
            code = code if bar.holds(record) else EXIT_BELOW_GATE
    return code
