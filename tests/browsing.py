"""Chromium without a screen, and axe-core, for the tests that drive pages.

CHROMIUM and AXE name others than those on the path and in the environment.
"""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
AXE = Path(__file__).parents[1] / ".venv/axe/node_modules/axe-core/axe.min.js"


def chromium_path():
    """Where Chromium is; None if it is not on the path."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def chromium():
    """A browser, for as long as it is needed."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium_path(), args=["--no-sandbox"])
        yield started
        started.close()


def axe_source():
    """The script of axe-core."""
    return Path(os.environ.get("AXE", AXE)).read_text(encoding="utf-8")
