"""Clients of a service in this process."""

import dataclasses
import threading
import time
from contextlib import contextmanager

from fastapi.testclient import TestClient

from bayestune.decisions import Calibration
from bayestune.posteriors import posterior_digest
from bayestune.serving import ArtefactStore, Limits, ServiceOptions
from bayestune.serving.application import make_app
from bayestune.serving.waiting import Waiting


@contextmanager
def serving(folders, limits=None, **settings):
    """A client of a service of these folders."""
    app = make_app(
        ArtefactStore(folders), limits or Limits(), ServiceOptions(reload_seconds=0, **settings)
    )
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        yield client


@contextmanager
def held(client):
    """The model is busy until the event is set."""
    begun = threading.Event()
    release = threading.Event()

    def work():
        begun.set()
        release.wait(20)

    client.app.state.handler.worker.submit([Waiting(call=work)])
    assert begun.wait(20)
    try:
        yield release
    finally:
        release.set()


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def with_band(folder, band, **more):
    """The folder's calibration, as one of a cascade."""
    calibration = Calibration.read(folder, posterior_digest(folder))
    settings = {**calibration.settings, "band": band, **more}
    dataclasses.replace(calibration, variant="cascade", settings=settings).write(folder)
