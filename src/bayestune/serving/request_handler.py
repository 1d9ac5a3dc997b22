"""Bodies → rows that wait → answers: what every path of the service does."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from bayestune.data import Question, checked_options
from bayestune.errors import Refusal
from bayestune.scoring import check_lengths, position_limit
from bayestune.serving.artefact_store import ArtefactStore, Served
from bayestune.serving.bodies import AskedBody, ChatBody, Message, RowBody
from bayestune.serving.limits import Limits
from bayestune.serving.waiting import Answer, Waiting, Worker
from bayestune.session import CalibratedPredictor, rows_as_fitted

Outcome = Answer | Refusal
Turns = tuple[tuple[str, str], ...]
T = TypeVar("T")


class TooLarge(Refusal):
    """More of something than a request may hold."""


class Unknown(Refusal):
    """There is no artefact of that name."""


@dataclass(frozen=True)
class RequestHandler:
    """Takes bodies in, and hands answers out."""

    store: ArtefactStore
    worker: Worker
    limits: Limits
    encoding: ThreadPoolExecutor  # of one thread: a tokenizer may not be used by two at once

    def served(self, name: str | None) -> Served:
        """The artefact of a name, the first one by default.

        Raises:
            Unknown: if there is none.
        """
        try:
            return self.store.get(name)
        except KeyError:
            raise Unknown(
                f"got model={shortened(str(name))}; expected one of {self.store.names}; GET "
                "/v1/models lists them"
            ) from None

    def predictor_for(self, served: Served, body: AskedBody | ChatBody) -> CalibratedPredictor:
        """How the artefact answers what a body asks for."""
        if (body.draws or 0) > self.limits.max_draws:
            raise TooLarge(
                f"got draws={body.draws}; expected {self.limits.max_draws} or fewer; ask for fewer"
            )
        return served.with_draws(body.draws, body.seed)

    async def answers(
        self, served: Served, predictor: CalibratedPredictor, bodies: Sequence[RowBody]
    ) -> list[Outcome]:
        """Each row's answer, or why there is none, in order.

        Raises:
            Refusal: if no row can be put or predicted, or they are too many or too long.
            Busy: if as many wait as may.
            Stopping: if the service ends.
        """
        most = min(self.limits.max_rows, self.limits.max_waiting)
        if len(bodies) > most:
            raise TooLarge(f"got {len(bodies)} rows; expected {most} or fewer; send parts")
        self.worker.check_room(len(bodies))  # before their texts are read
        read = await self.encoded(lambda: self._items(served, predictor, bodies))
        items = [item for item in read if isinstance(item, Waiting)]
        self.worker.submit(items)
        done = iter(await self._settled([item.future for item in items]))
        outcomes = [item if isinstance(item, Refusal) else next(done) for item in read]
        refused = [outcome for outcome in outcomes if isinstance(outcome, Refusal)]
        if len(refused) == len(outcomes):
            raise refused[0]
        return outcomes

    async def encoded(self, work: Callable[[], T]) -> T:
        """Runs a function that uses a tokenizer, once that is free, and returns its result."""
        return await asyncio.get_running_loop().run_in_executor(self.encoding, work)

    def refuse_long(self, served: Served, tokens: int) -> None:
        """Refuses a sequence longer than a request or the model may have."""
        places = position_limit(served.session.loaded.model) or tokens
        most = min(self.limits.max_request_tokens, places)
        if tokens > most:
            raise TooLarge(f"got {tokens} tokens; expected {most} or fewer; shorten the messages")

    async def call(self, work: Callable[[], Any]) -> Any:
        """Runs a function that uses the model, once that is free, and returns its result."""
        item = Waiting(call=work)
        self.worker.submit([item])
        (outcome,) = await self._settled([item.future])
        if isinstance(outcome, Refusal):
            raise outcome
        return outcome

    async def _settled(self, futures: "Sequence[Future[Any]]") -> list[Any]:
        """The results of futures; the refusal of one that is refused, such as for its logits."""
        wrapped = map(asyncio.wrap_future, futures)
        try:
            outcomes = await asyncio.gather(*wrapped, return_exceptions=True)
        finally:
            for future in futures:
                future.cancel()  # those that are done stay so
        for outcome in outcomes:
            if isinstance(outcome, BaseException) and not isinstance(outcome, Refusal):
                raise outcome
        return outcomes

    def _items(
        self, served: Served, predictor: CalibratedPredictor, bodies: Sequence[RowBody]
    ) -> list[Waiting | Refusal]:
        """Each row, ready to wait, or why it cannot be put; refuses too many tokens in all."""
        items: list[Waiting | Refusal] = []
        total = 0
        for number, body in enumerate(bodies, 1):
            try:
                item = self._item(served, predictor, body, number)
            except TooLarge:
                raise
            except Refusal as problem:
                items.append(problem)
                continue
            total += item.length
            if total > self.limits.max_request_tokens:
                most = self.limits.max_request_tokens
                raise TooLarge(f"got more than {most} tokens; expected fewer; send parts")
            items.append(item)
        return items

    def _item(
        self, served: Served, predictor: CalibratedPredictor, body: RowBody, number: int
    ) -> Waiting:
        details = served.fit.details
        row = question_of(body, number, served, self.limits)
        (row,) = rows_as_fitted([row], details)
        session = served.session
        (encoded,) = session.scorer.encode([row])
        check_lengths(session.loaded.model, [row], [encoded])
        return Waiting(predictor, row, encoded)


def question_of(body: RowBody, number: int, served: Served, limits: Limits) -> Question:
    """The question that a row of a request asks.

    Args:
        body: the row.
        number: its place in the request, from 1, which names a row without an id.
        served: whose options it has if it has none; if its fit is a chat, messages stay messages.
        limits: of the options.

    Raises:
        TooLarge: if it has too many options.
        Refusal: if it has no question, or fewer than two options, or some of them twice.
    """
    key = body.id if body.id is not None else f"row-{number}"
    options = body.options or list(served.options)
    most = limits.max_options
    if len(options) > most:
        raise TooLarge(
            f"row {shortened(key)}: got {len(options)} options; expected {most} or fewer"
        )
    question, context, turns = _texts_of(body, served, key)
    for text in (key, question or "", context, *options, *(text for _, text in turns)):
        _refuse_no_text(text)
    if question is None or not question.strip():
        raise Refusal(
            f"row {shortened(key)}: got no question; expected a text in `question`, or `messages`; "
            "give one"
        )
    if len(options) == 1:
        raise Refusal(f"row {shortened(key)}: got 1 option; expected two or more; give `options`")
    if not options:
        raise Refusal(f"row {shortened(key)}: got no options; expected two or more; give `options`")
    checked = checked_options(options, f"row {shortened(key)}")
    return Question(key, question, checked, None, context, turns)


def _texts_of(body: RowBody, served: Served, key: str) -> tuple[str | None, str, Turns]:
    """Question, context and earlier messages; if the fit is no chat, these become the context."""
    if body.messages is None:
        return body.question, body.context, ()
    if body.question is not None or (body.context and not served.is_chat):
        raise Refusal(f"row {shortened(key)}: got messages and a question; expected one of them")
    turns, question = asked_in(body.messages)
    if served.is_chat:
        return question, body.context, turns
    return question, "\n".join(f"{role}: {text}" for role, text in turns), ()


def service_line(answer: Answer, temperature: float | None = None) -> dict[str, Any]:
    """A line of the service: that of `predict`, with all fields whether calibrated or not.

    With a temperature, each draw's probabilities are in it.
    """
    line = dict(answer.line)
    line.pop("answer", None)
    for name in ("decision", "score", "set"):
        line.setdefault(name, None)
    applied = line["calibration"]
    bands = applied.get("bands") or () if isinstance(applied, Mapping) else ()
    line["band"] = line["decision"] if line["decision"] in bands else None
    line["calibration_applied"] = applied != "none"
    if temperature is not None:
        line["draws"] = (answer.logits.double() / temperature).softmax(-1).tolist()
    return line


def asked_in(messages: Sequence[Message]) -> tuple[Turns, str]:
    """The messages before the last one of a conversation, a role and a text each, and its question.

    A developer's message is a system message by its newer name.

    >>> hello = [Message(role="system", content="Be brief."), Message(role="user", content="Why?")]
    >>> asked_in(hello)
    ((('system', 'Be brief.'),), 'Why?')
    """
    *before, last = messages
    if last.role != "user":
        raise Refusal(f"got a last message of {last.role!r}; expected one of 'user'; end with it")
    roles = {"developer": "system"}
    turns = tuple((roles.get(message.role, message.role), message.text) for message in before)
    return turns, last.text


def _refuse_no_text(text: str) -> None:
    """Refuses halves of characters, which no tokenizer reads."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Refusal("got half a character (a lone surrogate); expected text; mend it") from None


def shortened(text: str) -> str:
    """A text as errors repeat it, in some characters and without control characters."""
    return ascii(text[:60] + ("…" if len(text) > 60 else ""))
