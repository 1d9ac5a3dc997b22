"""`serve`: the decisions service."""

from jsonargparse import Namespace

from bayestune.cli.options import built
from bayestune.serving import Limits, Reach, serve


def run_service(o: Namespace) -> None:
    """Answers questions over HTTP until the process is told to end."""
    serve(
        o.posteriors,
        built(Reach, o),
        built(Limits, o),
        model=o.model,
        cascade=o.cascade,
        log_texts=o.log_texts,
        reload_seconds=o.reload_seconds,
    )
