"""What every request passes: its size, its time to arrive, its token; and the line of the log."""

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from bayestune.serving.counters import Counters
from bayestune.serving.limits import Limits, is_loopback

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

requests = logging.getLogger("bayestune.requests")

OPEN = ("/", "/healthz", "/readyz", "/openapi.json")
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]


class Turned(Exception):
    """A request that goes no further, with its status and why."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind


def error_body(kind: str, message: str) -> dict[str, Any]:
    """An error in OpenAI's form."""
    return {"error": {"type": kind, "message": message}}


class RequestGuard:
    """Middleware that reads a body whole, within its limits, before anything else sees it."""

    def __init__(
        self,
        app: App,
        limits: Limits,
        counters: Counters,
        token: str | None = None,
        local: bool = False,
    ) -> None:
        self._app = app
        self._limits = limits
        self._counters = counters
        self._token = None if token is None else f"Bearer {token}".encode()
        self._local = local  # whether only names of this machine are answered to

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request through, or answers it with what is wrong."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin = time.perf_counter()
        log_line: dict[str, Any] = {"id": uuid.uuid4().hex[:12]}
        scope["log_line"] = log_line

        async def send_noted(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                log_line["status"] = message["status"]
                request_id = (b"x-request-id", log_line["id"].encode())
                message["headers"] = [*message.get("headers", ()), *_HEADERS, request_id]
            await send(message)

        try:
            self._check(scope)
            body = await self._body(scope, receive)
            await self._app(scope, _replayed(body, receive), send_noted)
        except Turned as reason:
            await _answer(send_noted, reason)
        finally:
            self._note(scope, log_line, time.perf_counter() - begin)

    def _check(self, scope: Scope) -> None:
        """Turns away a request to another host's name, or without the token."""
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        name = host if host.endswith("]") else host.rsplit(":", 1)[0]
        if self._local and not is_loopback(name):
            raise Turned(
                421,
                "wrong_host",
                "got another host name than this machine's; expected localhost; ask it by that, or "
                "start the service with --host",
            )
        if self._token is None or scope["path"] in OPEN:
            return
        given = headers.get(b"authorization", b"")
        if not hmac.compare_digest(given, self._token):
            got = "another token" if given else "no token"
            raise Turned(
                401,
                "unauthorized",
                f"got {got}; expected the service's own; send `Authorization: Bearer …`",
            )

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The body, whole; turns away one that is too large, cut off, or too slow to arrive."""
        most = self._limits.max_body
        length = dict(scope["headers"]).get(b"content-length", b"0")
        too_large = Turned(413, "too_large", f"got more than {most} bytes; expected fewer")
        if length.isdigit() and int(length) > most:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.read_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Turned(400, "cut_off", "got part of a request; expected all of it")
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise too_large
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            seconds = self._limits.read_seconds
            raise Turned(
                408, "too_slow", f"got part of a request in {seconds:g} s; expected all of it"
            ) from None

    def _note(self, scope: Scope, noted: dict[str, Any], seconds: float) -> None:
        """Counts a request, and logs it with what was noted on the way."""
        route = getattr(scope.get("route"), "path", "other")
        status = noted.pop("status", 500)
        self._counters.latency.labels(route, str(status)).observe(seconds)
        line = {"id": noted.pop("id"), "method": scope["method"], "route": route, "status": status}
        requests.info("", extra={"log_line": {**line, "ms": round(1000 * seconds, 1), **noted}})


def _replayed(body: bytes, receive: Receive) -> Receive:
    """What the application receives: the whole body at once, and then what the server says."""
    given = False

    async def read() -> MutableMapping[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return read


async def _answer(send: Send, reason: Turned) -> None:
    body = json.dumps(error_body(reason.kind, str(reason))).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    headers.append((b"content-length", str(len(body)).encode()))
    if reason.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    start = {"type": "http.response.start", "status": reason.status, "headers": headers}
    await send(start)
    await send({"type": "http.response.body", "body": body})
