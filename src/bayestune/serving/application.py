"""The paths of the service, and what each answers."""

import asyncio
import base64
import hashlib
import logging
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

import bayestune
from bayestune.errors import Refusal
from bayestune.serving.bodies import ChatBody, DecisionsBody, ErrorBody, RankBody, RowBody
from bayestune.serving.chat import completion
from bayestune.serving.counters import Counters
from bayestune.serving.desk import Desk, TooLarge, Unknown, told
from bayestune.serving.doorkeeper import Doorkeeper, error_body
from bayestune.serving.limits import Limits, Serving
from bayestune.serving.own_columns import named, refuse_unknown
from bayestune.serving.ranking_rows import ranked
from bayestune.serving.shelf import Served, Shelf
from bayestune.serving.waiting import Busy, Stopping, Worker

logger = logging.getLogger(__name__)

_ERRORS: Any = {
    code: {"model": ErrorBody} for code in (400, 401, 404, 408, 413, 422, 429, 503, 504)
}


def make_app(shelf: Shelf, limits: Limits | None = None, serving: Serving | None = None) -> FastAPI:
    """The service as an ASGI application; its thread starts and ends with it."""
    limits = limits or Limits()
    serving = serving or Serving()
    token = serving.token()
    counters = Counters(shelf)
    worker = Worker(limits, counters.saw)
    desk = Desk(shelf, worker, limits, ThreadPoolExecutor(1, "encoding"))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        shelf.watch(serving.reload_seconds)
        yield
        shelf.close()
        await asyncio.to_thread(worker.stop)

    app = FastAPI(
        title="bayestune",
        version=bayestune.__version__,
        summary="Decisions with probabilities that can be trusted",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's page loads its script from the network
        redoc_url=None,
    )
    app.add_middleware(
        Doorkeeper,
        limits=limits,
        counters=counters,
        token=token,
        local=serving.is_loopback and token is None,
    )
    app.state.desk = desk
    _say_errors(app)
    _add_state(app, desk, counters)
    _add_paths(app, desk, counters, serving)
    return app


def _add_state(app: FastAPI, desk: Desk, counters: Counters) -> None:
    page, policy = read_page()

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page_() -> HTMLResponse:
        return HTMLResponse(page, headers={"content-security-policy": policy})

    @app.get("/healthz", summary="Whether the process can answer at all")
    async def healthz() -> JSONResponse:
        alive = desk.worker.is_alive
        return JSONResponse({"status": "ok" if alive else "dead"}, 200 if alive else 503)

    @app.get("/readyz", summary="Whether a further request would be taken")
    async def readyz() -> JSONResponse:
        ready = desk.worker.is_ready
        told = {"status": "ready" if ready else "busy", "waiting": desk.worker.waiting}
        return JSONResponse({**told, "models": desk.shelf.names}, 200 if ready else 503)

    @app.get("/metrics", summary="Figures for Prometheus", response_class=Response)
    async def metrics() -> Response:
        await asyncio.to_thread(counters.renew, desk.worker.waiting)
        return Response(generate_latest(counters.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models", summary="The artefacts, and how each predicts")
    async def models() -> dict[str, Any]:
        data = [about(served, desk.limits) for served in desk.shelf.all()]
        return {"object": "list", "data": data}


def _add_paths(app: FastAPI, desk: Desk, counters: Counters, serving: Serving) -> None:
    @app.post("/v1/decisions", responses=_ERRORS, summary="Probabilities and what to do")
    async def decisions(body: DecisionsBody, request: Request) -> dict[str, Any]:
        """Answers one row, or each of `rows` in its place; one that cannot be put has an `error`.

        Probabilities, choice, entropies in nats, decision, score and set are those of
        `bayestune predict`.
        """
        served = desk.served(body.model)
        gated = desk.gated(served, body)
        single = body.rows is None
        columns = served.columns
        bodies = [_row(body, columns)] if body.rows is None else _rows(body, columns)
        _note(request, served, bodies, serving)
        async with asyncio.timeout(desk.limits.request_seconds):
            found = await desk.answers(served, gated, bodies)
        temperature = gated.calibration.temperature if gated.calibration else 1.0
        lines = []
        for row, outcome in zip(bodies, found, strict=True):
            if isinstance(outcome, Refusal):
                lines.append({"id": row.id, "error": str(outcome)})
                continue
            lines.append(told(outcome, temperature if body.include_draws else None))
            counters.decided(served.name, lines[-1]["decision"])
        common = {"model": served.name, "artefact": served.digest}
        return common | (lines[0] if single else {"rows": lines})

    @app.post("/v1/rank", responses=_ERRORS, summary="Which rows to label next")
    async def rank(body: RankBody, request: Request) -> dict[str, Any]:
        """Ranks rows as `bayestune rank` does; the first one teaches the most."""
        served = desk.served(body.model)
        body.rows = [named(row, served.columns) for row in body.rows]
        _note(request, served, body.rows, serving)
        async with asyncio.timeout(desk.limits.request_seconds):
            lines = await ranked(desk, served, body)
        return {"model": served.name, "artefact": served.digest, "rows": lines}

    @app.post("/v1/chat/completions", responses=_ERRORS, summary="As OpenAI's")
    async def chat(body: ChatBody, request: Request) -> dict[str, Any]:
        """One of `options`, or without any a short answer in free words, the likeliest one.

        Log-probabilities are those of the average over draws; `bayestune` has the decision.
        """
        served = desk.served(body.model)
        _note(request, served, (), serving)
        async with asyncio.timeout(desk.limits.request_seconds):
            answer = await completion(desk, body)
        if "decision" in answer["bayestune"]:
            counters.decided(served.name, answer["bayestune"]["decision"])
        return answer


def _row(body: DecisionsBody, columns: Mapping[str, str]) -> RowBody:
    names = (RowBody.model_fields.keys() & body.model_fields_set) | (body.model_extra or {}).keys()
    return named(RowBody.model_validate(body.model_dump(include=names)), columns)


def _rows(body: DecisionsBody, columns: Mapping[str, str]) -> list[RowBody]:
    refuse_unknown(body.model_extra)
    alone = [name for name in RowBody.model_fields if getattr(body, name)]
    alone = [name for name in alone if name != "options"]
    if alone:
        raise Refusal(f"got `{alone[0]}` beside `rows`; expected one of them; put it into a row")
    rows = [named(row, columns) for row in body.rows or ()]
    for number, row in enumerate(rows, 1):
        row.id = f"row-{number}" if row.id is None else row.id
        row.options = row.options or body.options
    ids = [row.id for row in rows]
    if len(set(ids)) < len(ids):
        raise Refusal("got rows that share an id; expected one for each; number them")
    return rows


def about(served: Served, limits: Limits) -> dict[str, Any]:
    """What a client may want to know of an artefact before it asks."""
    posterior = served.posterior
    details = served.fit.details
    calibration = served.calibration
    return {
        "id": served.name,
        "object": "model",
        "created": 0,
        "owned_by": "bayestune",
        "artefact": served.digest,
        "method": details["method"],
        "scoring": details["scoring"],
        "options": list(served.options),
        "columns": served.columns,
        "has_mean": posterior.has_mean,
        "atoms": posterior.atoms,
        "draws": served.decided.way.draws,
        "calibration": None if calibration is None else calibration.applied(),
        "limits": {
            "rows": limits.max_rows,
            "options": limits.max_options,
            "draws": limits.max_draws,
        },
    }


def _note(request: Request, served: Served, rows: Sequence[RowBody], serving: Serving) -> None:
    """What the log says of a request; its texts only if asked for."""
    noted = request.scope["told"]
    noted |= {"model": served.name, "rows": len(rows)}
    if serving.log_texts:
        noted["texts"] = [row.question for row in rows]


def _say_errors(app: FastAPI) -> None:
    """Every error has OpenAI's form and repeats nothing of the request but names and numbers."""

    def answered(status: int, kind: str, said: Callable[[Any], str], **headers: str) -> Any:
        async def handle(_: Request, problem: Exception) -> JSONResponse:
            return JSONResponse(error_body(kind, said(problem)), status, headers or None)

        return handle

    seconds = "this took too long; expected fewer rows or draws at once; ask again with less"
    full = "as many rows wait as may; ask again in a second"
    handlers: dict[Any, Any] = {
        RequestValidationError: answered(422, "invalid_request", _faults),
        HTTPException: _of_http,
        Refusal: answered(422, "refused", str),
        TooLarge: answered(413, "too_large", str),
        Unknown: answered(404, "unknown_model", str),
        Busy: answered(429, "busy", lambda _: full, **{"retry-after": "1"}),
        Stopping: answered(503, "stopping", lambda _: "the service ends; ask another one"),
        TimeoutError: answered(504, "too_slow", lambda _: seconds),
        Exception: answered(500, "unexpected", _unexpected),
    }
    for kind, handle in handlers.items():
        app.add_exception_handler(kind, handle)


async def _of_http(_: Request, problem: HTTPException) -> JSONResponse:
    kind = {404: "unknown_path", 405: "wrong_method"}.get(problem.status_code, "invalid_request")
    return JSONResponse(error_body(kind, str(problem.detail)), problem.status_code)


def _faults(problem: RequestValidationError) -> str:
    """What does not fit, by the names of the fields."""
    found = []
    for error in problem.errors()[:5]:
        place = ".".join(str(part)[:40] for part in error["loc"] if part != "body")
        found.append(f"{place or 'body'}: {error['msg']}")
    return "; ".join(found).encode("ascii", "backslashreplace").decode()


def _unexpected(problem: Exception) -> str:
    logger.error("unexpected %s", type(problem).__name__)
    return f"unexpected {type(problem).__name__}: a fault of the service, not of the request"


def read_page() -> tuple[str, str]:
    """The page, and the policy that lets its own script and style run and nothing else."""
    page = files("bayestune.serving").joinpath("page.html").read_text(encoding="utf-8")
    allowed = {}
    for tag in ("script", "style"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        allowed[tag] = f"'sha256-{digest}'"
    parts = ["default-src 'none'", "connect-src 'self'", "img-src data:", "base-uri 'none'"]
    parts += ["form-action 'none'", "frame-ancestors 'none'"]
    parts += [f"{tag}-src {digest}" for tag, digest in allowed.items()]
    return page, "; ".join(parts)
