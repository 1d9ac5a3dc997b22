"""Rows that wait, and the thread that answers them: those that come together share a pass."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from bayestune.data import Question
from bayestune.posteriors import count_for
from bayestune.scoring import Encoded
from bayestune.serving.limits import Limits
from bayestune.session import CalibratedPredictor, RowOutputs

logger = logging.getLogger(__name__)

_MOST_ROWS = 64  # of a pass
_DRAWS = 4  # with more draws a pass has fewer rows
# Tokens of padding that cost about as much as one more pass, which has to read all weights anew.
_PADDING = {"cpu": 32}
_PADDING_ELSEWHERE = 1024


class Busy(Exception):
    """As many rows wait as may."""


class Stopping(Exception):
    """The service ends and takes no more."""


@dataclass(frozen=True, eq=False)
class Answer:
    """A row's line, as `predict` writes it, its logits (S, C), and what the model read."""

    line: dict[str, Any]
    logits: Tensor
    encoded: Encoded

    @property
    def tokens(self) -> int:
        """How many it read."""
        return self.encoded["length"]


@dataclass(eq=False)
class Waiting:
    """A row that waits for its answer, or a call that waits for its turn on the model."""

    predictor: CalibratedPredictor | None = None
    row: Question | None = None
    encoded: Encoded = field(default_factory=dict)
    call: Callable[[], Any] | None = None
    future: "Future[Any]" = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)

    @property
    def length(self) -> int:
        """Tokens of each of its sequences."""
        return self.encoded["length"]

    @cached_property
    def sequences(self) -> int:
        """How many it has."""
        if self.predictor is None:
            return 1
        return self.predictor.session.scorer.sequences(self.encoded)

    @property
    def tokens(self) -> int:
        """Those of all its sequences."""
        return self.length * self.sequences


def padded(items: Sequence[Waiting]) -> int:
    """The tokens of a pass over some rows, with padding."""
    longest = max(item.length for item in items)
    widest = max(item.sequences for item in items)
    return len(items) * longest * widest


# is called after each pass with its predictor, rows and outputs, and its tokens with padding
See = Callable[[CalibratedPredictor, Sequence[Question], RowOutputs, int], None]


class Worker:
    """A bounded queue, and one thread that makes the passes.

    The oldest row is always in the next pass. With it go rows of the same artefact and way, those
    nearest to it in length, as long as the pass keeps its budget of tokens and their padding costs
    less than a pass of their own.
    """

    def __init__(self, limits: Limits, see: See) -> None:
        self._limits = limits
        self._see = see  # is told of each pass
        self._queue: deque[Waiting] = deque()
        self._ready = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="passes", daemon=True)

    def start(self) -> None:
        """Begins to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Answers what waits, takes no more, and ends."""
        with self._ready:
            self._stopping = True
            self._ready.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether the thread answers."""
        return self._thread.is_alive()

    @property
    def is_ready(self) -> bool:
        """Whether a further row would be taken."""
        return self.is_alive and not self._stopping and self.waiting < self._limits.max_waiting

    @property
    def waiting(self) -> int:
        """How many rows wait."""
        return len(self._queue)

    def check_room(self, count: int) -> None:
        """Refuses so many further rows if they cannot wait.

        Raises:
            Busy: if they would be more than may wait.
            Stopping: if the service ends.
        """
        with self._ready:
            if self._stopping:
                raise Stopping
            self._drop_cancelled()
            if len(self._queue) + count > self._limits.max_waiting:
                raise Busy

    def submit(self, items: Sequence[Waiting]) -> None:
        """Queues rows, all or none, or refuses them as `check_room` does."""
        with self._ready:
            self.check_room(len(items))
            self._queue.extend(items)
            self._ready.notify_all()

    def _run(self) -> None:
        while (items := self._next()) is not None:
            items = [item for item in items if item.future.set_running_or_notify_cancel()]
            if not items:
                continue
            try:
                self._answer(items)
            except Exception as problem:
                self._one_by_one(items, problem)

    def _next(self) -> list[Waiting] | None:
        """The rows of the next pass; None at the end."""
        with self._ready:
            while not self._queue:
                if self._stopping:
                    return None
                self._ready.wait()
            end = self._queue[0].since + self._limits.window_ms / 1000
            while not self._stopping and (left := end - time.monotonic()) > 0:
                self._ready.wait(left)
            self._drop_cancelled()
            together = self._together() if self._queue else []
            ids = set(map(id, together))
            self._queue = deque(item for item in self._queue if id(item) not in ids)
            return together

    def _drop_cancelled(self) -> None:
        """Leaves out the rows of requests that have timed out."""
        self._queue = deque(item for item in self._queue if not item.future.cancelled())

    def _together(self) -> list[Waiting]:
        """The oldest item, and the rows that share its pass."""
        oldest = self._queue[0]
        if oldest.predictor is None or oldest.predictor.fit.posterior.by_batch:
            return [oldest]
        same = [item for item in self._queue if item.predictor is oldest.predictor]
        same.sort(key=lambda item: abs(item.tokens - oldest.tokens))
        share = _token_share(oldest.predictor)
        device = oldest.predictor.session.loaded.model.device.type
        most_padding = share * _PADDING.get(device, _PADDING_ELSEWHERE)
        together = same[:1]
        for item in same[1:_MOST_ROWS]:
            with_item = [*together, item]
            size = padded(with_item)
            padding = size - sum(each.tokens for each in with_item)
            if size > share * self._limits.pass_tokens or padding > most_padding:
                break
            together = with_item
        return together

    def _answer(self, items: Sequence[Waiting]) -> None:
        """Makes the pass of some rows, or a call, and settles their futures."""
        predictor = items[0].predictor
        if predictor is None:
            call = items[0].call
            assert call is not None
            items[0].future.set_result(call())
            return
        encoded = [item.encoded for item in items]
        rows = [item.row for item in items if item.row is not None]
        begin = time.perf_counter()
        outputs = predictor.row_predictor.at_encoded(encoded, len(items))
        lines = predictor.lines_of(rows, outputs)
        seconds = time.perf_counter() - begin
        self._count(predictor, outputs, items, seconds)  # whoever has an answer finds it counted
        for item, line, logits in zip(items, lines, outputs.logits.unbind(1), strict=True):
            item.future.set_result(Answer(line, logits[:, : len(line["options"])], item.encoded))

    def _count(
        self,
        predictor: CalibratedPredictor,
        outputs: RowOutputs,
        items: Sequence[Waiting],
        seconds: float,
    ) -> None:
        """Logs a pass and hands it to `see`, whose faults cost no answer."""
        tokens = padded(items)
        logger.debug("%d rows, %d tokens with padding, in %.3f s", len(items), tokens, seconds)
        try:
            rows = [item.row for item in items if item.row is not None]
            self._see(predictor, rows, outputs, tokens)
        except Exception as problem:
            logger.warning("a pass is not in the figures: %s", type(problem).__name__)

    def _one_by_one(self, items: Sequence[Waiting], problem: Exception) -> None:
        """Answers rows whose pass failed each by itself, so that only those at fault fail."""
        if len(items) == 1:
            items[0].future.set_exception(problem)
            return
        for item in items:
            if item.future.done():
                continue
            try:
                self._answer([item])
            except Exception as of_item:
                item.future.set_exception(of_item)


def _token_share(predictor: CalibratedPredictor) -> float:
    """The share of `pass_tokens` that a pass may have: less than 1 with more than four draws."""
    if predictor.way.band:  # most rows of a cascade do not go on to the draws
        return 1.0
    posterior = predictor.fit.posterior
    return min(1.0, _DRAWS / posterior.passes(count_for(posterior, predictor.way.draws)))
