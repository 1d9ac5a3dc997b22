"""Starts the service; here its extra is looked for."""

import importlib
import logging
from collections.abc import Sequence
from pathlib import Path

from bayestune.errors import Refusal
from bayestune.serving.artefact_store import ArtefactStore
from bayestune.serving.limits import Limits, ServiceOptions

logger = logging.getLogger(__name__)

_EXTRA = {"fastapi", "uvicorn", "prometheus_client", "pydantic", "starlette", "h11"}


def serve(
    folders: Sequence[Path],
    serving: ServiceOptions | None = None,
    limits: Limits | None = None,
    model: str | None = None,
) -> None:
    """Answers questions over HTTP until the process is told to end.

    Args:
        folders: of `fit`, or calibrated adapters; the first one is the default.
        serving: where to listen, and who may ask.
        limits: of requests.
        model: the base model, where it has moved.

    Raises:
        Refusal: if the extra is missing, others than this machine could ask without a token, or an
            artefact cannot be opened.
    """
    serving = serving or ServiceOptions()
    limits = limits or Limits()
    token = serving.token()
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
    store = ArtefactStore(folders, model)
    if serving.cascade:
        for served in store.all():
            served.check_cascade()
    if not serving.is_loopback and token is None:
        logger.warning(
            "anybody who reaches this machine may ask: %s is open and there is no token",
            serving.host,
        )
    server.log_as_json()
    app = application.make_app(store, limits, serving)
    try:
        server.listen(app, serving.host, serving.port, limits.read_seconds)
    except KeyboardInterrupt:  # the signal that uvicorn has obeyed is raised once more
        logger.info("ended")
