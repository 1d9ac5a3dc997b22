"""The built site in headless Chromium: it asks no network, nothing is cut, axe-core finds nothing.

`make test-browser` installs playwright, mkdocs and axe-core; CHROMIUM, AXE and SITE (a built site)
name others.
"""

import os
import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from browsing import axe_source, chromium

pytestmark = pytest.mark.browser
ROOT = Path(__file__).parents[2]
SCREENS = {"desktop": (1280, 900), "phone": (390, 844)}
LOOKS = [(screen, light) for screen in SCREENS for light in ("light", "dark")]


class Quiet(SimpleHTTPRequestHandler):
    """A server that does not print what it is asked."""

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if built := os.environ.get("SITE"):
        return Path(built)
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder


@pytest.fixture(scope="module")
def address(site):
    """Where the site is served: from a disk the theme's search asks a network for help."""
    handler = partial(Quiet, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.mark.parametrize("look", LOOKS)
def test_no_page_has_findings_asks_a_network_or_is_cut(site, address, browser, look):
    width, height = SCREENS[look[0]]
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=look[1], reduced_motion="reduce"
    )
    page = context.new_page()
    asked, wrong = [], {}
    page.on("request", lambda request: asked.append(request.url))
    for path in sorted(site.rglob("*.html")):
        page.goto(address + path.relative_to(site).as_posix())
        page.evaluate(axe_source())
        options = "{resultTypes: ['violations']}"
        found = page.evaluate(f"axe.run(document, {options})")["violations"]
        named = [(one["id"], one["nodes"][0]["html"][:150], len(one["nodes"])) for one in found]
        if page.evaluate("document.documentElement.scrollWidth > innerWidth"):
            named.append(("wider than the screen", "", 1))
        if named:
            wrong[path.relative_to(site).as_posix()] = named
    context.close()
    assert [url for url in asked if not url.startswith(address)] == []
    assert wrong == {}
