"""`serve`: the decisions service."""

from jsonargparse import Namespace

from bayestune.cli.options import built
from bayestune.serving import Limits, ServiceOptions, serve


def run_service(o: Namespace) -> None:
    """Answers questions over HTTP until the process is told to end."""
    serve(o.posteriors, built(ServiceOptions, o), built(Limits, o), o.model)
