"""A calibration applied: the one way from rows to decisions, for every command and for Python."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayestune import decisions
from bayestune.data import Question
from bayestune.decisions import Calibration, Decision
from bayestune.evaluation import (
    Evaluated,
    EvaluationOptions,
    Result,
    label_of,
    make_result,
    prediction_rows,
)
from bayestune.forward import Draws
from bayestune.posteriors import Prediction, artefact_folder, posterior_digest
from bayestune.scoring import Encoded
from bayestune.session.artefact import Artefact, Rows, content_of, rows_of, unsure_options
from bayestune.session.fit import Fit
from bayestune.session.prediction_ways import BATCH, Way, joined
from bayestune.session.session import WINDOW, Session

PROMPT_LENGTH = "prompt_length"  # the score that every artefact has for nothing


def read_calibration(folder: Path | str) -> Calibration | None:
    """That of an artefact, or None if it has none; refused if the artefact has changed since."""
    if not Path(folder).is_dir():
        return None
    place = artefact_folder(folder)
    if not (place / decisions.FILE_NAME).is_file():
        return None
    return Calibration.read(place, posterior_digest(place))


@dataclass(frozen=True)
class Gated:
    """What predicts, how, and the calibration that is applied; None for probabilities alone."""

    session: Session
    fit: Fit
    way: Way
    calibration: Calibration | None = None

    def lines(self, rows: Sequence[Question]) -> list[dict[str, Any]]:
        """One JSON object a row, of some rows at once: the prediction and what to do with it."""
        encoded = self.session.quietly().scorer.encode(rows)
        return self.lines_of(rows, encoded, self.passed(encoded))

    def lines_of(
        self, rows: Sequence[Question], encoded: Sequence[Encoded], logits: Tensor
    ) -> list[dict[str, Any]]:
        """The lines of rows whose logits (S, N, C) are known."""
        told = prediction_rows(rows, self._prediction(logits))
        decided = self.decide(rows, logits, lengths_of(encoded)).rows()
        names = ("decision", "score", "set", "calibration")
        for line, decision in zip(told, decided, strict=True):
            line |= {name: decision[name] for name in names if name in decision}
        return told

    def logits(self, rows: Sequence[Question]) -> Tensor:
        """Logits (S, N, C) of some rows at once."""
        return self.passed(self.session.quietly().scorer.encode(rows))

    def passed(self, encoded: Sequence[Encoded], batch_size: int = BATCH) -> Tensor:
        """Logits (S, N, C) of encoded rows, so many in a pass."""
        return self.way.passed(self.fit, self.session.scorer, encoded, batch_size)

    def decide(
        self, rows: Sequence[Question], logits: Tensor, extra: Mapping[str, Tensor] | None = None
    ) -> Decision:
        """What is decided of rows with these logits, and scores known beside them."""
        if extra is None and self.calibration is not None:
            extra = extra_scores(self.session, rows)
        text = self.calibration.settings.get("unsure") if self.calibration else None
        unsure = unsure_options(rows, text)
        return decisions.decide(
            self.calibration,
            logits,
            [content_of(row) for row in rows],
            None if unsure is None else torch.tensor(unsure),
            extra,
        )

    def answers(self, rows: Sequence[Question]) -> Iterator[dict[str, Any]]:
        """The lines of `predict`, in order; with an `error` where a row cannot be put."""
        if self.calibration is None:
            return self.undecided(rows, Draws(self.way.draws, self.way.draw_seed))
        return self.session.told(rows, self.lines)

    def undecided(
        self, rows: Sequence[Question], draws: Draws, *, decided: bool = False
    ) -> Iterator[dict[str, Any]]:
        """The same without a calibration, in the precision of the fit; see `Session.predict`."""
        for line in self.session.answers(self.fit, draws, rows, decided=decided):
            yield line if "error" in line else {**line, "calibration": "none"}

    def evaluated(self, options: EvaluationOptions) -> Result:
        """The record of the calibrated predictions of the session's labelled rows."""
        rows = self.session.rows()
        begin = time.perf_counter()
        parts = [rows[start : start + WINDOW] for start in range(0, len(rows), WINDOW)]
        logits = [self.logits(part) for part in parts]
        seconds = time.perf_counter() - begin
        count = self.way.draws if self.fit.posterior.atoms is None else self.fit.posterior.atoms
        count = 0 if count == 1 and self.fit.posterior.atoms else count
        found = Evaluated(count, self._prediction(joined(logits)), seconds, count)
        result = make_result(self._facts(count), rows, found, options)
        decided: list[dict[str, Any]] = []
        for part, own in zip(parts, logits, strict=True):
            decided += self.decide(part, own).rows()
        return _with_decisions(result, decided)

    def _facts(self, count: int) -> dict[str, Any]:
        label = label_of(self.fit.label, count, self.fit.posterior)
        kind = ", student" if self.way.student else ""
        kind = ", cascade" if self.way.band else kind
        label = f"{label}{kind}, calibrated"
        facts = {"task": self.session.task.name, "rows": "evaluation", "label": label}
        return facts | self.fit.facts(self.session.options)

    def _prediction(self, logits: Tensor) -> Prediction:
        temperature = self.calibration.temperature if self.calibration else 1.0
        exact = self.fit.posterior.atoms is not None
        return Prediction.of(logits.double() / temperature, exact=exact)


def _with_decisions(result: Result, decided: Sequence[Mapping[str, Any]]) -> Result:
    """A result whose rows say what is done with them, and whose figures say how that went."""
    rows = []
    acted = []
    for row, decision in zip(result.rows, decided, strict=True):
        names = ("decision", "score", "set", "calibration")
        rows.append(row | {name: decision[name] for name in names})
        if decision["decision"] == "act":
            acted.append(row["choice"] == row["answer"])
    figures = {"acted": len(acted) / len(rows), "risk": 1 - sum(acted) / max(1, len(acted))}
    if not acted:
        figures["risk"] = 0.0
    gate = result.record["gate"] | figures
    applied = decided[0]["calibration"]
    return Result(result.record | {"gate": gate, "calibration": applied}, rows)


def extra_scores(session: Session, rows: Sequence[Question]) -> dict[str, Tensor]:
    """Scores that are known of rows beside those of their logits."""
    return lengths_of(session.quietly().scorer.encode(rows))


def lengths_of(encoded: Sequence[Encoded]) -> dict[str, Tensor]:
    """The same of encoded rows."""
    lengths = [float(row["length"]) for row in encoded]
    return {PROMPT_LENGTH: torch.tensor(lengths, dtype=torch.float64)}


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
        `score` (its name, value and threshold) and `set`; an `error` where a row cannot be put.

    Raises:
        Refusal: if the artefact has changed since it was calibrated.
    """
    calibration = read_calibration(folder) if calibrated else None
    asked = rows_of(rows, folder, labelled=False)
    way = Way.of(calibration.settings) if calibration else None
    opened = Artefact.open(folder, asked, None, model, way)
    session = replace(opened.session, progress=progress)
    return list(Gated(session, opened.fit, way or Way(), calibration).answers(opened.rows))
