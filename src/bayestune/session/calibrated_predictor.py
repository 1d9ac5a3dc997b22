"""A calibration applied: the one way from rows to decisions, for every command and for Python."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayestune import decisions
from bayestune.data import Question, SortedRows, sort_rows
from bayestune.decisions import Calibration
from bayestune.errors import Refusal
from bayestune.evaluation import (
    Evaluated,
    EvaluationOptions,
    Result,
    label_of,
    make_result,
    prediction_rows,
)
from bayestune.forward import Draws
from bayestune.posteriors import (
    Prediction,
    artefact_folder,
    count_for,
    is_hub_id,
    posterior_digest,
)
from bayestune.session.artefact import Artefact, Rows, content_of, rows_for_artefact, unsure_options
from bayestune.session.as_fitted import (
    lines_of_all_rows,
    read_options_of_fit,
    seen_facts,
    with_classes_of_fit,
)
from bayestune.session.fit import Fit, details_of
from bayestune.session.prediction_options import PredictionOptions
from bayestune.session.row_predictor import DISTANCE, RowOutputs, RowPredictor, kept_reference
from bayestune.session.session import Session


def read_calibration(folder: Path | str) -> Calibration | None:
    """An artefact's calibration; None if it has none.

    Args:
        folder: of the artefact, here or on the Hub.

    Raises:
        Refusal: if the artefact has changed since it was calibrated.
    """
    on_hub = isinstance(folder, str) and is_hub_id(folder)
    if not (on_hub or Path(folder).is_dir()):
        return None
    place = artefact_folder(folder)
    if not (place / decisions.FILE_NAME).is_file():
        return None
    return Calibration.read(place, posterior_digest(place))


@dataclass(frozen=True)
class CalibratedPredictor:
    """Predicts rows and decides on them.

    Args:
        session: the base model, and the rows as they are put to it.
        fit: what predicts.
        way: how.
        calibration: what decides; None for probabilities alone.
    """

    session: Session
    fit: Fit
    way: PredictionOptions
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        atoms = self.fit.posterior.atoms
        fixed = self.calibration is not None and atoms is not None and atoms > 1
        if fixed and self.way.draws not in (0, atoms):
            raise Refusal(
                f"the calibration is of another average: got one of {self.way.draws} draws, "
                f"expected {atoms}, which this posterior takes; run bayestune calibrate again"
            )

    def lines(self, rows: Sequence[Question]) -> list[dict[str, Any]]:
        """One JSON object for each of a few rows: the prediction and what to do with it."""
        return self.lines_of(rows, self.row_predictor.at(rows))

    def lines_of(self, rows: Sequence[Question], outputs: RowOutputs) -> list[dict[str, Any]]:
        """The same, made of the rows' outputs, without a pass."""
        lines = prediction_rows(rows, self._prediction(outputs.logits))
        pairs = zip(lines, self.decisions_of(rows, outputs), strict=True)
        return [{**line, **decision} for line, decision in pairs]

    @cached_property
    def row_predictor(self) -> RowPredictor:
        """Gives the rows' logits and scores, distances among them if the calibration has any."""
        scorer = self.session.quietly().scorer
        return RowPredictor(self.fit, self.way, scorer, kept_reference(self.calibration))

    def decisions_of(self, rows: Sequence[Question], outputs: RowOutputs) -> list[dict[str, Any]]:
        """What is decided on each row, with its distance if the outputs have one."""
        text = self.calibration.settings.get("unsure") if self.calibration else None
        unsure = unsure_options(rows, text)
        decided = decisions.decide(
            self.calibration,
            outputs.logits,
            [content_of(row) for row in rows],
            None if unsure is None else torch.tensor(unsure),
            outputs.extra,
            self._class_of(rows, outputs.logits.shape[-1]),
        )
        names = ("decision", "score", "set", "calibration")
        lines = []
        for index, decision in enumerate(decided.rows()):
            line = {name: decision[name] for name in names if name in decision}
            if DISTANCE in outputs.extra:
                line[DISTANCE] = outputs.extra[DISTANCE][index].item()
            lines.append(line)
        return lines

    def _class_of(self, rows: Sequence[Question], width: int) -> Tensor | None:
        """The class that each option is, (N, C), −1 for none; None if nothing is by class."""
        names = self.calibration.settings.get("classes") if self.calibration else None
        if names is None:
            return None
        class_index = {name: index for index, name in enumerate(names)}
        class_of = torch.full((len(rows), width), -1)
        for number, row in enumerate(rows):
            indices = [class_index.get(option, -1) for option in row.options]
            class_of[number, : len(indices)] = torch.tensor(indices)
        return class_of

    def answers(self, rows: Sequence[Question]) -> Iterator[dict[str, Any]]:
        """The lines of `predict`, in order; with an `error` where a row cannot be put."""
        if self.calibration is None:
            return self.uncalibrated(rows, Draws(self.way.draws, self.way.draw_seed))
        return self.session.in_windows(rows, self.lines)

    def uncalibrated(
        self, rows: Sequence[Question], draws: Draws, *, decided: bool = False
    ) -> Iterator[dict[str, Any]]:
        """The same without a calibration, in the precision of the fit; see `Session.predict`."""
        for line in self.session.answers(self.fit, draws, rows, decided=decided):
            yield line if "error" in line else {**line, "calibration": "none"}

    def evaluated(self, options: EvaluationOptions) -> Result:
        """The record of the calibrated predictions of the session's labelled rows.

        The rows are divided among the processes of a launcher.
        """
        rows = self.session.rows()
        begin = time.perf_counter()
        outputs = self.row_predictor.over(rows, shared=True)
        seconds = time.perf_counter() - begin
        count = count_for(self.fit.posterior, self.way.draws)
        if self.fit.posterior.atoms == 1:  # a point: its only draw is its mean
            count = 0
        evaluated = Evaluated(count, self._prediction(outputs.logits), seconds, count)
        facts = self._facts(count) | seen_facts(self.fit.details, rows)
        as_used = replace(options, draws=(count,), draw_seed=self.way.draw_seed, shared_prefix=None)
        result = make_result(facts, rows, evaluated, as_used)
        return self._with_decisions(result, rows, self.decisions_of(rows, outputs))

    def _with_decisions(
        self, result: Result, questions: Sequence[Question], decided: Sequence[Mapping[str, Any]]
    ) -> Result:
        """A result with each row's decision, and with the share, risk and cost of acting.

        Risk and cost are means over the rows acted on, None if there are none.
        """
        calibration = self.calibration
        assert calibration is not None
        pairs = zip(result.rows, decided, strict=True)
        rows = [{**row, **decision} for row, decision in pairs]
        acted = []
        for question, row in zip(questions, rows, strict=True):
            if row["decision"] == calibration.acting:
                acted.append((question, row))
        count = len(acted)
        wrong = sum(row["choice"] != question.answer for question, row in acted)
        figures: dict[str, float | None] = {"acted": count / len(rows)}
        figures["risk"] = wrong / count if count else None
        if calibration.costs is not None:
            costs = [self._cost(question, row["choice"]) for question, row in acted]
            figures["cost"] = sum(costs) / count if count else None
        gate = result.record["gate"] | figures
        applied = calibration.applied()
        return Result(result.record | {"gate": gate, "calibration": applied}, rows)

    def _cost(self, question: Question, choice: int) -> float:
        """What acting on a row costs, as a share of the greatest cost; classes go by their names.

        If the right or the chosen option is none of the classes, an error costs as much as the
        worst one.
        """
        assert self.calibration is not None
        costs = self.calibration.costs
        assert costs is not None
        assert question.answer is not None
        names = list(self.calibration.settings.get("classes") or question.options)
        right = question.options[question.answer]
        chosen = question.options[choice]
        if right not in names or chosen not in names:
            return float(right != chosen)
        return costs[names.index(right)][names.index(chosen)] / max(map(max, costs))

    def _facts(self, count: int) -> dict[str, Any]:
        """What the record says of the fit and of how it predicts."""
        label = label_of(self.fit.label, count, self.fit.posterior)
        if self.way.band:
            label = f"{label}, cascade"
        elif self.way.student:
            label = f"{label}, student"
        label = f"{label}, calibrated"
        facts = {"task": self.session.task.name, "rows": "evaluation", "label": label}
        return facts | replace(self.fit, bf16=self.way.bf16).facts(self.session.options)

    def _prediction(self, logits: Tensor) -> Prediction:
        decisions.check_draws(logits)
        temperature = self.calibration.temperature if self.calibration else 1.0
        exact = self.fit.posterior.atoms is not None
        return Prediction.in_parts(logits, exact=exact, temperature=temperature)


def decide(
    folder: Path | str,
    rows: Rows,
    *,
    model: str | None = None,
    calibrated: bool = True,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Predicts rows with an artefact as its calibration says; the lines of `bayestune predict`.

    Args:
        folder: of `fit`, or a calibrated LoRA adapter's.
        rows: questions, or a file of them.
        model: the base model, where it has moved.
        calibrated: whether `calibration.json` is applied, if there is one.
        progress: whether predictions show progress bars.

    Returns:
        One object a row: probabilities, choice, entropies, and with a calibration `decision`,
        `score` (its name, value and threshold) and `set`; an `error` where a row cannot be put, or
        a row of a file not be read.

    Raises:
        Refusal: if the artefact has changed since it was calibrated.
    """
    calibration = read_calibration(folder) if calibrated else None
    of_file = _sorted(Path(rows), folder) if isinstance(rows, str | Path) else None
    questions = rows_for_artefact(
        rows if of_file is None else of_file.questions, folder, labelled=False
    )
    way = PredictionOptions.of(calibration.settings) if calibration else None
    artefact = Artefact.open(folder, questions, None, model, way)
    session = replace(artefact.session, progress=progress)
    way = way or PredictionOptions()
    predictor = CalibratedPredictor(session, artefact.fit, way, calibration)
    lines = predictor.answers(artefact.rows)
    return list(lines if of_file is None else lines_of_all_rows(of_file, lines))


def _sorted(file: Path, folder: Path | str) -> SortedRows:
    """The rows of a file that the artefact in a folder can answer, and the others."""
    details = details_of(artefact_folder(folder))
    return with_classes_of_fit(sort_rows(file, read_options_of_fit(details)), details)
