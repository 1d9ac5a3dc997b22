"""`serve`: the decisions service."""

from jsonargparse import Namespace

from bayestune.cli.options import build
from bayestune.serving import Limits, ServiceOptions, serve


def run_service(args: Namespace) -> None:
    """Answers questions over HTTP until the process is told to end."""
    serve(args.posteriors, build(ServiceOptions, args), build(Limits, args), args.model)
