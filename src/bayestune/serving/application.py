"""The service as an application: its page, its state, its errors."""

import asyncio
import base64
import hashlib
import logging
import re
from collections.abc import AsyncIterator, Callable
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
from bayestune.serving.artefact_store import ArtefactStore, Served
from bayestune.serving.counters import Counters
from bayestune.serving.limits import Limits, ServiceOptions
from bayestune.serving.paths import Paths
from bayestune.serving.request_guard import RequestGuard, error_body
from bayestune.serving.request_handler import RequestHandler, TooLarge, Unknown
from bayestune.serving.waiting import Busy, Stopping, Worker

logger = logging.getLogger(__name__)


def make_app(
    store: ArtefactStore, limits: Limits | None = None, serving: ServiceOptions | None = None
) -> FastAPI:
    """The service as an ASGI application; its thread starts and ends with it."""
    limits = limits or Limits()
    serving = serving or ServiceOptions()
    token = serving.token()
    counters = Counters(store)
    worker = Worker(limits, counters.saw)
    handler = RequestHandler(store, worker, limits, ThreadPoolExecutor(1, "encoding"))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        store.watch(serving.reload_seconds)
        yield
        store.close()
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
        RequestGuard,
        limits=limits,
        counters=counters,
        token=token,
        local=serving.is_loopback and token is None,
    )
    app.state.handler = handler
    _say_errors(app)
    _add_state(app, handler, counters)
    Paths(handler, counters, serving).add_to(app)
    return app


def _add_state(app: FastAPI, handler: RequestHandler, counters: Counters) -> None:
    page, policy = read_page()

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page_() -> HTMLResponse:
        return HTMLResponse(page, headers={"content-security-policy": policy})

    @app.get("/healthz", summary="Whether the process can answer at all")
    async def healthz() -> JSONResponse:
        alive = handler.worker.is_alive
        return JSONResponse({"status": "ok" if alive else "dead"}, 200 if alive else 503)

    @app.get("/readyz", summary="Whether a further request would be taken")
    async def readyz() -> JSONResponse:
        ready = handler.worker.is_ready
        state = {"status": "ready" if ready else "busy", "waiting": handler.worker.waiting}
        return JSONResponse({**state, "models": handler.store.names}, 200 if ready else 503)

    @app.get("/metrics", summary="Figures for Prometheus", response_class=Response)
    async def metrics() -> Response:
        await asyncio.to_thread(counters.renew, handler.worker.waiting)
        return Response(generate_latest(counters.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models", summary="The artefacts, and how each predicts")
    async def models() -> dict[str, Any]:
        data = [about(served, handler.limits) for served in handler.store.all()]
        return {"object": "list", "data": data}


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
        "draws": served.calibrated.way.draws,
        "calibration": None if calibration is None else calibration.applied(),
        "limits": {
            "rows": limits.max_rows,
            "options": limits.max_options,
            "draws": limits.max_draws,
        },
    }


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
