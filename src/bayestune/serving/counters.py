"""Figures for Prometheus: latency, decisions, abstentions, passes, and whether rows drift."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from bayestune.data import Question
from bayestune.decisions import ROW_SCORES, Calibration, as_kept, drift_test, score_rows
from bayestune.serving.artefact_store import ArtefactStore
from bayestune.session import DISTANCE, CalibratedPredictor, RowOutputs

_RECENT = 500  # the last contents, in which drift is looked for
_LEAST = 50  # contents that a test of drift needs
_PERMUTATIONS = 199
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


@dataclass
class Recent:
    """The scores of an artefact's last rows, and whether they are like the held-out ones.

    Each content counts once: the same question asked again is no further evidence.
    """

    calibration: Calibration
    values: dict[str, dict[str, float]] = field(default_factory=dict)  # by content, latest last
    _changes: int = 0  # how many new contents were added
    _latest: tuple[int, float, float] = (-1, 0.0, 0.0)  # changes then, distance, p-value
    _lock: threading.Lock = field(default_factory=threading.Lock)  # passes add, others read

    def add(self, outputs: RowOutputs, contents: Sequence[str]) -> None:
        """Remembers some rows by their contents."""
        names = [name for name in self._names() if name in self.calibration.held_out]
        of_logits = [name for name in names if name in ROW_SCORES]
        scores = score_rows(outputs.logits, of_logits, self.calibration.temperature)
        scores |= {name: outputs.extra[name] for name in names if name in outputs.extra}
        columns = as_kept(scores)
        with self._lock:
            for row, content in enumerate(contents):
                self._changes += content not in self.values
                self.values.pop(content, None)  # so that it becomes the latest
                self.values[content] = {name: values[row] for name, values in columns.items()}
            for content in list(self.values)[:-_RECENT]:
                del self.values[content]

    def drift(self) -> tuple[float, float] | None:
        """The largest distance of a score, and the test's p-value; None for too few contents."""
        with self._lock:
            rows = list(self.values.values())
            changes = self._changes
        if len(rows) < _LEAST or not rows[0]:
            return None
        if self._latest[0] != changes:
            new = {}
            for name in rows[0]:
                new[name] = torch.tensor([row[name] for row in rows])
            kept = self.calibration.held_out
            held_out = {name: torch.tensor(kept[name]) for name in new}
            drift = drift_test(held_out, new, _PERMUTATIONS)
            self._latest = (changes, max(drift.statistics.values()), drift.p_value)
        return self._latest[1:]

    def _names(self) -> list[str]:
        usual = ("total_entropy", "corrected_mutual_information", DISTANCE)
        return list(dict.fromkeys([self.calibration.score, *usual]))


class Counters:
    """The figures of one service, in a registry of its own."""

    def __init__(self, store: ArtefactStore) -> None:
        self.registry = CollectorRegistry()
        self._store = store
        self._recent: dict[str, Recent] = {}
        own = {"registry": self.registry, "namespace": "bayestune"}
        self.latency = Histogram(
            "request_seconds",
            "From a request's first byte to its answer",
            ["route", "status"],
            buckets=_SECONDS,
            **own,
        )
        self.decisions = Counter("decisions", "Rows by decision", ["model", "decision"], **own)
        self.abstentions = Counter("abstentions", "Rows that are not acted on", ["model"], **own)
        self.rows = Counter("rows", "Rows answered", ["model"], **own)
        self.pass_rows = Histogram(
            "pass_rows", "Rows of a pass", buckets=(1, 2, 4, 8, 16, 32, 64), **own
        )
        self.pass_tokens = Counter("pass_tokens", "Tokens of the passes, with padding", **own)
        self.waiting = Gauge("waiting_rows", "Rows that wait", **own)
        self.reloads = Gauge("reloads", "How often an artefact was opened anew", ["model"], **own)
        self._distance = Gauge(
            "drift_distance", "Largest distance of recent scores from held-out", ["model"], **own
        )
        self._p_value = Gauge("drift_p_value", "Of recent rows like held-out", ["model"], **own)

    def saw(
        self,
        predictor: CalibratedPredictor,
        rows: Sequence[Question],
        outputs: RowOutputs,
        tokens: int,
    ) -> None:
        """Counts a pass. Only rows that were predicted as calibrated count for drift."""
        self.pass_rows.observe(outputs.logits.shape[1])
        self.pass_tokens.inc(tokens)
        if predictor.calibration is None:
            return
        for served in self._store.all():
            if served.calibrated is predictor:
                recent = self._recent.get(served.name)
                if recent is None or recent.calibration is not predictor.calibration:
                    recent = self._recent[served.name] = Recent(predictor.calibration)
                recent.add(outputs, [row.fingerprint for row in rows])

    def decided(self, model: str, decision: str | None) -> None:
        """Counts a row that was answered; `decision` is None if it was not decided on."""
        self.rows.labels(model).inc()
        if decision is None:
            return
        self.decisions.labels(model, decision).inc()
        if decision in ("abstain", "ask"):
            self.abstentions.labels(model).inc()

    def renew(self, waiting: int) -> None:
        """Brings up to date the figures that are computed only when somebody asks for them."""
        self.waiting.set(waiting)
        for name, count in list(self._store.reloads.items()):
            self.reloads.labels(name).set(count)
        for name, recent in list(self._recent.items()):
            drift = recent.drift()
            if drift is not None:
                distance, p_value = drift
                self._distance.labels(name).set(distance)
                self._p_value.labels(name).set(p_value)
