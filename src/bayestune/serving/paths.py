"""What the paths that answer rows do: decisions, a ranking, a chat."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request

from bayestune.errors import Refusal
from bayestune.serving.artefact_store import Served
from bayestune.serving.bodies import ChatBody, DecisionsBody, ErrorBody, RankBody, RowBody
from bayestune.serving.chat import completion
from bayestune.serving.counters import Counters
from bayestune.serving.limits import ServiceOptions
from bayestune.serving.own_columns import named, refuse_unknown
from bayestune.serving.ranking_rows import ranked
from bayestune.serving.request_handler import RequestHandler, service_line
from bayestune.session import CalibratedPredictor

_ERRORS: Any = {
    code: {"model": ErrorBody} for code in (400, 401, 404, 408, 413, 422, 429, 503, 504)
}


@dataclass(frozen=True)
class Paths:
    """The paths that answer rows; each method's docstring is what the service says of its path."""

    handler: RequestHandler
    counters: Counters
    serving: ServiceOptions

    def add_to(self, app: FastAPI) -> None:
        """Registers them."""
        for path, answer, summary in (
            ("/v1/decisions", self.decisions, "Probabilities and what to do"),
            ("/v1/rank", self.rank, "Which rows to label next"),
            ("/v1/chat/completions", self.chat, "As OpenAI's"),
        ):
            app.post(path, responses=_ERRORS, summary=summary)(answer)

    async def decisions(self, body: DecisionsBody, request: Request) -> dict[str, Any]:
        """Answers one row, or each of `rows` in its place; one that cannot be put has an `error`.

        Probabilities, choice, entropies in nats, decision, score and set are those of
        `bayestune predict`.
        """
        served = self.handler.served(body.model)
        predictor = self.handler.predictor_for(served, body)
        single = body.rows is None
        bodies = [_row(body, served.columns)] if single else _rows(body, served.columns)
        self._note(request, served, bodies)
        async with asyncio.timeout(self.handler.limits.request_seconds):
            outcomes = await self.handler.answers(served, predictor, bodies)
        lines = []
        for row, outcome in zip(bodies, outcomes, strict=True):
            lines.append(self._line(row, outcome, served, predictor, body.include_draws))
        common = {"model": served.name, "artefact": served.digest}
        return common | (lines[0] if single else {"rows": lines})

    def _line(
        self,
        row: RowBody,
        outcome: Any,
        served: Served,
        predictor: CalibratedPredictor,
        with_draws: bool,
    ) -> dict[str, Any]:
        """The line of one row, which is counted: its answer, or why there is none."""
        if isinstance(outcome, Refusal):
            return {"id": row.id, "error": str(outcome)}
        temperature = predictor.calibration.temperature if predictor.calibration else 1.0
        line = service_line(outcome, temperature if with_draws else None)
        self.counters.decided(served.name, line["decision"])
        return line

    async def rank(self, body: RankBody, request: Request) -> dict[str, Any]:
        """Ranks rows as `bayestune rank` does; the first one teaches the most."""
        served = self.handler.served(body.model)
        body.rows = [named(row, served.columns) for row in body.rows]
        self._note(request, served, body.rows)
        async with asyncio.timeout(self.handler.limits.request_seconds):
            lines = await ranked(self.handler, served, body)
        return {"model": served.name, "artefact": served.digest, "rows": lines}

    async def chat(self, body: ChatBody, request: Request) -> dict[str, Any]:
        """One of `options`, or without any a short answer in free words, the likeliest one.

        Log-probabilities are those of the average over draws; `bayestune` has the decision.
        """
        served = self.handler.served(body.model)
        self._note(request, served, ())
        async with asyncio.timeout(self.handler.limits.request_seconds):
            answer = await completion(self.handler, body)
        if "decision" in answer["bayestune"]:
            self.counters.decided(served.name, answer["bayestune"]["decision"])
        return answer

    def _note(self, request: Request, served: Served, rows: Sequence[RowBody]) -> None:
        """Adds model and rows to a request's line of the log; the texts only if asked for."""
        log_line = request.scope["log_line"]
        log_line |= {"model": served.name, "rows": len(rows)}
        if self.serving.log_texts:
            log_line["texts"] = [row.question for row in rows]


def _row(body: DecisionsBody, columns: Mapping[str, str]) -> RowBody:
    """The single row of a body: its fields without those of the request."""
    names = (RowBody.model_fields.keys() & body.model_fields_set) | (body.model_extra or {}).keys()
    return named(RowBody.model_validate(body.model_dump(include=names)), columns)


def _rows(body: DecisionsBody, columns: Mapping[str, str]) -> list[RowBody]:
    """The several rows of a body, each with an id, and the body's options if it has none."""
    refuse_unknown(body.model_extra)
    of_rows = [name for name in RowBody.model_fields if name != "options"]
    beside = [name for name in of_rows if getattr(body, name)]
    if beside:
        raise Refusal(f"got `{beside[0]}` beside `rows`; expected one of them; put it into a row")
    rows = [named(row, columns) for row in body.rows or ()]
    for number, row in enumerate(rows, 1):
        row.id = f"row-{number}" if row.id is None else row.id
        row.options = row.options or body.options
    ids = [row.id for row in rows]
    if len(set(ids)) < len(ids):
        raise Refusal("got rows that share an id; expected one for each; number them")
    return rows
