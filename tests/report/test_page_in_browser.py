"""The page in headless Chromium: it draws, answers, and axe-core finds nothing.

`make test-browser` installs playwright and axe-core; CHROMIUM and AXE name others.
"""

import math
from pathlib import Path

import pytest
from recorded import evaluated, sampled_rows, with_rows

from bayestune.report import write_page
from browsing import axe_source, chromium

pytestmark = pytest.mark.browser
ROOT = Path(__file__).parents[2]
SCREENS = {"desktop": (1280, 900), "phone": (360, 740)}
LONG = "a very long name of a team that nobody would cut, "


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


def rich_rows(num_rows, shift=0.0):
    """Decided rows of three options with contexts and draws; the first has a hundred options."""
    rows = sampled_rows(num_rows, sharpness=1.0 - shift)
    for i, one in enumerate(rows):
        p = one["probabilities"]
        bent = [(1 - s / 10) * p[0] for s in range(4)]
        one["drawn"] = [[first, 1 - first - p[2], p[2]] for first in bent]
        one |= {"question": f"Question {i}?", "context": "A passage.", "options": ["a", LONG, "c"]}
        one |= {"decision": "act" if one["confidence"] > 0.6 else "abstain", "set": [0]}
        one |= {"calibration": {"risk": 0.2, "confidence": 0.9}}
        one |= {"score": {"name": "s", "value": 1 - one["confidence"], "threshold": 0.4}}
    many = {"probabilities": [0.01] * 100, "options": [f"{LONG}{i}" for i in range(100)]}
    del rows[0]["drawn"]
    most = math.log(100)
    rows[0] |= many | {"confidence": 0.01, "answer": 99, "total_entropy": most}
    return rows


def in_bands(row):
    """The row, decided by bands of other names."""
    decision = {"act": "auto", "abstain": "ask"}[row["decision"]]
    return row | {"decision": decision, "calibration": {"bands": {"auto": 0.2, "look": 0.4}}}


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """A page on which every section has something to show."""
    folder = tmp_path_factory.mktemp("results")
    slots = {f"m.layers.{i}.{slot}_proj.lora_A": 0.1 + i / 100 for i in range(6) for slot in "qv"}
    course = [{"step": i, "loss": 1 / i, "kl": 100 / i, "std_over_prior": 0.5} for i in range(1, 9)]
    fit = {"fit": {"std": slots, "prior_std": 0.2, "history": course}, "name": "BLoB"}
    facts = {"trained_on": "arc_easy", "seconds": {"predict": 9.0}, "timed_draws": 4, **fit}
    metrics = evaluated(folder, "x")["metrics"]
    rows = rich_rows(120)
    shifted = [in_bands(one) for one in rich_rows(120, 0.5)]
    facts["metrics"] = metrics
    records = [
        evaluated(folder, "MLE", 2.0, seconds={"predict": 1.0}, draws=0),
        with_rows(folder, sampled_rows(120), "BLoB N=0", **facts | {"draws": 0}),
        with_rows(folder, sampled_rows(120, sharpness=0.7), "BLoB N=4", **facts | {"draws": 4}),
        with_rows(folder, rows, "BLoB N=4, calibrated", **facts | {"draws": 4}),
        with_rows(folder, shifted, "BLoB N=4", task="mmlu", **facts | {"draws": 4}),
    ]
    return write_page({folder: records}, folder / "report.html", "Runs </script>")


@pytest.fixture(params=[(screen, light) for screen in SCREENS for light in ("light", "dark")])
def look(request):
    return request.param


@pytest.fixture
def opened(browser, page_file, look):
    """The page, all drawn; requests and console messages are in `heard`."""
    width, height = SCREENS[look[0]]
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=look[1], offline=True
    )
    page = context.new_page()
    page.heard = []
    page.on("console", lambda message: page.heard.append(message.text))
    page.on("pageerror", lambda error: page.heard.append(str(error)))
    page.on("request", lambda request: page.heard.append(request.url))
    page.goto(page_file.as_uri())
    page.wait_for_selector("html[data-drawn=all]", state="attached", timeout=120_000)
    page.heard.remove(page_file.as_uri())
    yield page
    context.close()


def test_the_page_draws_without_network_errors_or_findings(opened, look):
    sections = opened.eval_on_selector_all(
        "[data-chart]",
        "all => all.map(one => [one.dataset.chart, one.querySelectorAll('svg').length])",
    )
    # four runs of one task are drawn; the calibrated one and N = 4 alone have draws that disagree
    assert {name: count > 0 for name, count in sections} == dict.fromkeys(dict(sections), True)
    assert dict(sections)["reliability"] == 4
    assert opened.heard == []
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert opened.evaluate("document.documentElement.scrollHeight") < 39_000
    for selector in ("figure details", ".row"):
        opened.eval_on_selector_all(selector, "all => all.slice(0, 6).forEach(d => d.open = true)")
    opened.wait_for_timeout(200)
    opened.evaluate(axe_source())
    found = opened.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    assert [(one["id"], one["nodes"][0]["html"][:200]) for one in found] == []


def test_no_caption_is_cut(opened, look):
    """Every text of a chart lies inside its drawing, and every paragraph inside the window."""
    cut = opened.evaluate(
        """() => [...document.querySelectorAll('.chart svg text')].filter(text => {
          const own = text.getBoundingClientRect();
          const all = text.closest('svg').getBoundingClientRect();
          const wide = own.left < all.left - 1 || own.right > all.right + 1;
          const tall = own.top < all.top - 1 || own.bottom > all.bottom + 1;
          return own.width && (wide || tall || text.textContent.includes('…'));
        }).map(text => text.textContent)"""
    )
    assert cut == []
    wide = opened.evaluate(
        """() => [...document.querySelectorAll('p, h1, h2, h3, dd, button, select')].filter(
          one => one.getBoundingClientRect().right > innerWidth + 1 && !one.closest('.scroll')
        ).map(one => one.textContent)"""
    )
    assert wide == []


@pytest.mark.parametrize("look", [("desktop", "light")], indirect=False)
def test_the_table_sorts_filters_and_chooses_what_is_drawn(opened, look):
    names = "#run-table tbody th"
    opened.click("#run-table thead button:has-text('NLL')")
    values = [
        float(text)
        for text in opened.eval_on_selector_all(
            "#run-table tbody tr", "all => all.map(one => one.cells[5].firstChild.textContent)"
        )
    ]
    assert values == sorted(values)
    assert opened.get_attribute("#run-table th[aria-sort=ascending]", "scope") == "col"
    opened.keyboard.press("Enter")  # the heading keeps the focus
    assert opened.locator("#run-table th[aria-sort=descending]").count() == 1
    opened.fill("#run-filter", "mmlu")
    assert opened.locator(names).all_inner_texts() == ["BLoB N=4, mmlu"]
    opened.click("#draw-these")
    opened.wait_for_function(
        "document.querySelectorAll('[data-chart=reliability] svg').length === 1"
    )
    opened.click("#draw-none")
    opened.wait_for_function("document.querySelectorAll('.chart').length === 0")


@pytest.mark.parametrize("look", [("desktop", "light")], indirect=False)
def test_rows_open_with_draws_and_a_bin_shows_its_rows(opened, look):
    opened.select_option("#row-run", label="BLoB N=4, calibrated, arc_easy")
    first = opened.locator(".row").first
    first.locator("summary").click()
    first.locator(".options li").first.wait_for()  # a row is drawn once it is open
    assert first.locator(".options li").count() == 8
    first.locator("button").click()
    assert first.locator(".options li").count() == 100
    assert first.bounding_box()["height"] < 1000
    second = opened.locator(".row").nth(1)
    second.locator("summary").focus()
    opened.keyboard.press("Enter")
    shown = second.locator(".options li").first.inner_text()
    assert second.locator(".options li").first.locator(".track b").count() == 4
    assert "draws" in shown
    told = second.locator(".options .told").all_inner_texts()
    shares = [float(one.split("%")[0]) for one in told]
    assert shares == sorted(shares, reverse=True)
    figure = opened.locator("[data-chart=reliability] figure").last
    figure.locator("summary").click()
    line = figure.locator("tbody tr").last
    line.locator("button").click()
    count = line.locator("td").first.inner_text()
    assert opened.inner_text("#row-count").startswith(f"{count} of 120 rows")


@pytest.mark.parametrize("look", [("desktop", "light")], indirect=False)
def test_rows_that_were_acted_on_are_shown_whatever_the_band_is_called(opened, look):
    for run in ("BLoB N=4, calibrated, arc_easy", "BLoB N=4, mmlu"):
        opened.select_option("#row-run", label=run)
        counts = []
        for shown in ("act", "ask"):
            opened.select_option("#row-show", shown)
            counts.append(int(opened.inner_text("#row-count").split()[0]))
        assert min(counts) > 0
        assert sum(counts) == 120


@pytest.mark.parametrize("look", [("desktop", "light")], indirect=False)
def test_two_runs_are_compared_row_by_row(opened, look):
    opened.select_option("#before", label="MLE, arc_easy")
    opened.select_option("#after", label="BLoB N=4, calibrated, arc_easy")
    said = opened.inner_text("#changes p")
    cells = opened.locator("#changes tbody td").all_inner_texts()
    both_right, broken, mended, both_wrong = map(int, cells)
    assert both_right + broken + mended + both_wrong == 119  # one has other options
    assert f"{mended} became right and {broken} wrong" in said
    opened.click("#changes button:has-text('another choice')")
    changed = int(said.split()[0])
    assert opened.inner_text("#row-count").startswith(f"{changed} of ")
