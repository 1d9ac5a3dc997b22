"""Starts the service; here its extra is looked for."""

import importlib
import logging
from collections.abc import Sequence
from pathlib import Path

from bayestune.errors import NOT_NEGATIVE, Refusal
from bayestune.serving.limits import Limits, Reach
from bayestune.serving.shelf import Shelf

logger = logging.getLogger(__name__)

_EXTRA = {"fastapi", "uvicorn", "prometheus_client", "pydantic", "starlette", "h11"}


def serve(
    folders: Sequence[Path],
    reach: Reach | None = None,
    limits: Limits | None = None,
    *,
    model: str | None = None,
    cascade: bool = False,
    log_texts: bool = False,
    reload_seconds: float = 5.0,
) -> None:
    """Answers questions over HTTP until the process is told to end.

    Args:
        folders: of `fit`, or calibrated adapters; the first one is the default.
        reach: where to listen, and who may ask.
        limits: of requests.
        model: the base model, where it has moved.
        cascade: whether all artefacts must be calibrated as a cascade.
        log_texts: whether the log has the questions.
        reload_seconds: between two looks after changed artefacts; 0 for never.

    Raises:
        Refusal: if the extra is missing, others than this machine could ask without a token, or an
            artefact cannot be opened.
    """
    reach = reach or Reach()
    limits = limits or Limits()
    if reload_seconds not in NOT_NEGATIVE:
        raise Refusal(
            f"got reload_seconds={reload_seconds}; expected {NOT_NEGATIVE.said}; 0: never"
        )
    token = reach.token()
    try:
        application = importlib.import_module("bayestune.serving.application")
        server = importlib.import_module("bayestune.serving.server")
    except ImportError as problem:
        if (problem.name or "").partition(".")[0] not in _EXTRA:
            raise
        got = f"no {problem.name}"
        raise Refusal(
            f"got {got}; expected the service's extra; pip install 'bayestune[serve]'"
        ) from problem
    shelf = Shelf(folders, model)
    if cascade:
        for served in shelf.all():
            served.check_cascade()
    if not reach.is_loopback and token is None:
        logger.warning(
            "anybody who reaches this machine may ask: %s is open and there is no token", reach.host
        )
    rules = application.Rules(token, reach.is_loopback, log_texts, reload_seconds)
    server.log_as_json()
    app = application.make_app(shelf, limits, rules)
    try:
        server.listen(app, reach.host, reach.port, limits.read_seconds)
    except KeyboardInterrupt:  # the signal that uvicorn has obeyed is raised once more
        logger.info("ended")
