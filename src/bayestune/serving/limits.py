"""What a service takes from a request, and how it is run."""

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from bayestune.errors import COUNT, NOT_NEGATIVE, POSITIVE, Range, Refusal, check_fields

TOKEN_VARIABLE = "BAYESTUNE_TOKEN"
_LEAST_TOKEN = 16  # characters
_PORT = Range("a whole number from 0 to 65535; 0 for any free one", low=0, high=65535, whole=True)


@dataclass(frozen=True)
class Limits:
    """What one request may hold, how many rows may wait, and how long anything may take.

    Args:
        max_body: bytes of a request.
        max_rows: rows of a request.
        max_options: options of a row.
        max_request_tokens: tokens of a request's rows, together.
        max_draws: posterior draws that a request may ask for.
        max_answer_tokens: tokens of an answer that is written freely.
        max_waiting: rows that wait, of all requests; then 429.
        request_seconds: how long a request may take; then 504.
        read_seconds: how long a client may take to send one; then 408.
        window_ms: how long a row waits for others to share its pass.
        pass_tokens: tokens of one pass, rows times the longest, fewer under more than four draws; a
            longer row has a pass of its own.
    """

    max_body: int = 2**20
    max_rows: int = 256
    max_options: int = 64
    max_request_tokens: int = 65536
    max_draws: int = 100
    max_answer_tokens: int = 16
    max_waiting: int = 1024
    request_seconds: float = 60.0
    read_seconds: float = 10.0
    window_ms: float = 4.0
    pass_tokens: int = 4096

    def __post_init__(self) -> None:
        check_fields(self, max_body=COUNT, max_rows=COUNT, max_options=COUNT, max_draws=COUNT)
        check_fields(self, max_request_tokens=COUNT, max_answer_tokens=COUNT, max_waiting=COUNT)
        check_fields(self, request_seconds=POSITIVE, read_seconds=POSITIVE, pass_tokens=COUNT)
        check_fields(self, window_ms=NOT_NEGATIVE)


@dataclass(frozen=True)
class ServiceOptions:
    """Where a service listens, who may ask it, and what it looks after.

    Args:
        host: address to listen on.
        port: of the address; 0 for any free one.
        token_file: holds the token that requests must carry; else the variable BAYESTUNE_TOKEN.
        open_to_all: whether an address beyond this machine may do without a token.
        cascade: whether to refuse an artefact that is not calibrated as a cascade.
        log_texts: whether the log has the questions too.
        reload_seconds: between two looks after folders that have changed; 0 for never.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token_file: Path | None = None
    open_to_all: bool = False
    cascade: bool = False
    log_texts: bool = False
    reload_seconds: float = 5.0

    def __post_init__(self) -> None:
        check_fields(self, port=_PORT, reload_seconds=NOT_NEGATIVE)

    @property
    def is_loopback(self) -> bool:
        """Whether nobody but this machine reaches the address."""
        return is_loopback(self.host)

    def token(self) -> str | None:
        """The token that requests must carry; None if they need none.

        Raises:
            Refusal: if it is too short, or others than this machine could ask without one.
        """
        token = os.environ.get(TOKEN_VARIABLE)
        if self.token_file is not None:
            token = self.token_file.read_text(encoding="utf-8")
        token = token.strip() if token else None
        if self.token_file is not None or token is not None:
            return _checked(token or "")
        if not self.is_loopback and not self.open_to_all:
            raise Refusal(
                f"got --host {self.host} without a token: anybody who reaches this machine could "
                f"ask; expected one in --token_file or ${TOKEN_VARIABLE}; give one, keep "
                "127.0.0.1, or say --open_to_all"
            )
        return None


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's for itself.

    >>> is_loopback("localhost"), is_loopback("[::1]"), is_loopback("example.org")
    (True, True, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _checked(token: str) -> str:
    if len(token) < _LEAST_TOKEN or not token.isascii() or any(c.isspace() for c in token):
        got = f"a token of {len(token)} characters"
        raise Refusal(
            f"got {got}; expected {_LEAST_TOKEN} or more ASCII characters without spaces; make one "
            "with `python -c 'import secrets; print(secrets.token_urlsafe())'`"
        )
    return token
