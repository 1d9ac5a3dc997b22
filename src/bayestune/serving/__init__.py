"""A decisions service over HTTP: artefacts that answer questions, and a page to ask them on.

Requests that come together are answered in one pass. `serve` needs the extra `serve`.
"""

from bayestune.serving.artefact_store import ArtefactStore
from bayestune.serving.limits import Limits, ServiceOptions
from bayestune.serving.starting import serve

__all__ = ["ArtefactStore", "Limits", "ServiceOptions", "serve"]
