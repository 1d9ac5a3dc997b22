"""Listens: uvicorn with the limits of slow clients, and the log as JSON lines."""

import asyncio
import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from bayestune.serving.request_guard import error_body

_GRACE = 30  # seconds for requests in flight at the end
_MOST_CONNECTIONS = 2048


def listen(app: FastAPI, host: str, port: int, read_seconds: float) -> None:
    """Answers until a signal says to end; requests in flight are answered then."""
    patient = type("Patient", (Impatient,), {"seconds": read_seconds})
    config = uvicorn.Config(
        app,
        host,
        port,
        http=patient,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=_MOST_CONNECTIONS,
        timeout_graceful_shutdown=_GRACE,
        h11_max_incomplete_event_size=2**16,
    )
    Announced(config).run()


class Announced(uvicorn.Server):
    """A server that says where it listens, once it does."""

    async def startup(self, sockets: Any = None) -> None:
        """Begins to listen."""
        await super().startup(sockets)
        for server in self.servers:
            for own in server.sockets:
                host, port = own.getsockname()[:2]
                name = f"[{host}]" if ":" in host else host
                sys.stdout.write(f"listening on http://{name}:{port}\n")
        sys.stdout.flush()


class Impatient(H11Protocol):
    """A connection that is closed if a request's head does not arrive in time."""

    seconds = 10.0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begins to wait."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(self.seconds, self._late)

    def data_received(self, data: bytes) -> None:
        """Waits anew for the rest of a head that came in part."""
        super().data_received(data)
        if self._timer is None and self._waits:
            self._timer = self.loop.call_later(self.seconds, self._late)

    @property
    def _waits(self) -> bool:
        """Whether part of a head is there, or nothing at all yet."""
        if self.cycle is None:
            return True
        return self.cycle.response_complete and bool(self.conn.trailing_data[0])

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends to wait."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def _late(self) -> None:
        self._timer = None
        if self.transport.is_closing() or not self._waits:
            return
        message = f"got no whole head in {self.seconds:g} s; expected one"
        body = json.dumps(error_body("too_slow", message)).encode()
        head = "HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode() + body)
        self.transport.close()


class JsonLines(logging.Formatter):
    """A record as one line of JSON: time, level, and what it tells."""

    def format(self, record: logging.LogRecord) -> str:
        """The line; control characters are escaped."""
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        own = getattr(record, "log_line", None) or {"message": record.getMessage()}
        line = {"time": when, "level": record.levelname.lower(), "logger": record.name, **own}
        if record.exc_info:
            line["error"] = str(record.exc_info[0])
        return json.dumps(line)


def log_as_json() -> None:
    """Has this process log JSON lines to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.getLogger().handlers = [handler]
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
