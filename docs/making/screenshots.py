r"""Takes the pictures of the service's page and of the report in docs/, in headless Chromium.

    PYTHONPATH=tests python docs/making/screenshots.py [POSTERIOR]

The report is that of `results/demo`. POSTERIOR is a calibrated folder of `fit`; without one the
service's pictures stay as they are. Theirs is the demo's, called `everyday`, after

    bayestune calibrate everyday --rows src/bayestune/data/everyday/default/validation.jsonl \
        --risk 0.25 --confidence 0.9 --draws '[10]' --factors '[]'
"""

import io
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from browsing import chromium

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docs/images"
WIDE, NARROW, REPORT = (1200, 900), (390, 844), (1000, 1200)
ROOM = 12  # pixels
MOST = 150_000  # bytes of a picture
DRAWN = "BLoB N=10"  # the run whose row is shown
QUESTION = "Why does ice float on water?"
OPTIONS = ("ice is colder", "ice is harder", "ice is less dense", "ice is heavier")


def keep(picture: bytes, name: str) -> None:
    """Writes a picture in at most 256 colours."""
    path = IMAGES / name
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    size = path.stat().st_size
    print(f"{path.relative_to(ROOT)}: {image.width} x {image.height}, {size} bytes")
    if size > MOST:
        sys.exit(f"got {size} bytes of {name}; expected at most {MOST}; show less")


@contextmanager
def opened(browser: Any, address: str, size: tuple[int, int]) -> Iterator[Any]:
    """A light page of an address."""
    width, height = size
    viewport = {"width": width, "height": height}
    context = browser.new_context(viewport=viewport, color_scheme="light", reduced_motion="reduce")
    page = context.new_page()
    page.goto(address)
    yield page
    context.close()


def part(page: Any, selector: str) -> bytes:
    """The first element that a selector finds, with some room around it."""
    page.evaluate("scrollTo(0, 0)")  # boxes are measured from where the page is scrolled to
    box = page.locator(selector).first.bounding_box()
    clip = {"x": box["x"] - ROOM, "y": box["y"] - ROOM}
    clip |= {"width": box["width"] + 2 * ROOM, "height": box["height"] + 2 * ROOM}
    return page.screenshot(full_page=True, clip=clip)


@contextmanager
def service(posterior: Path) -> Iterator[str]:
    """The address of a service."""
    command = [sys.executable, "-m", "bayestune", "serve", str(posterior), "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith("listening on "):
                sys.exit("the service did not start")
            yield line.removeprefix("listening on ").strip()
        finally:
            process.terminate()


def take_decision(page: Any) -> bytes:
    """The page with a question, its answer and the draws."""
    page.wait_for_selector("#model option", state="attached")
    page.fill("#question", QUESTION)
    page.fill("#options", "\n".join(OPTIONS))
    page.click("#go")
    page.wait_for_selector("#verdict", timeout=120_000)
    page.wait_for_selector("#compared", timeout=120_000)
    return page.screenshot(full_page=True)


def take_report(browser: Any, folder: Path) -> None:
    """A report's head, its reliability diagrams, and a row with its draws."""
    with TemporaryDirectory() as place:
        file = Path(place) / "report.html"
        command = [sys.executable, "-m", "bayestune", "report", str(folder), "--to", str(file)]
        subprocess.run(command, check=True)
        with opened(browser, file.as_uri(), REPORT) as page:
            page.wait_for_selector("#reliability canvas, #reliability svg")
            end = page.locator("#reliability").bounding_box()["y"]
            head = {"x": 0, "y": 0, "width": REPORT[0], "height": end}
            keep(page.screenshot(full_page=True, clip=head), "report.png")
            keep(part(page, "#reliability"), "report_reliability.png")
            page.select_option("#row-run", label=DRAWN)
            page.locator("#row-list summary").first.click()
            keep(part(page, "#row-list details.row"), "report_row.png")


def main() -> None:
    """Takes all of them."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("posterior", nargs="?", type=Path, help="a calibrated folder of `fit`")
    given = parser.parse_args()
    with chromium() as browser:
        take_report(browser, ROOT / "results/demo")
        if given.posterior is None:
            return
        with service(given.posterior) as address:
            for name, size in (("service.png", WIDE), ("service_phone.png", NARROW)):
                with opened(browser, address, size) as page:
                    keep(take_decision(page), name)


if __name__ == "__main__":
    main()
