"""The page in headless Chromium: a decision, its numbers, an error, many rows, and axe-core."""

import json
import socket
import threading
import time

import pytest
import uvicorn

pytestmark = pytest.mark.browser
pytest.importorskip("playwright.sync_api")

from bayestune.serving import ArtefactStore, Limits, ServiceOptions  # noqa: E402
from bayestune.serving.application import make_app  # noqa: E402
from browsing import axe_source, chromium  # noqa: E402

SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def address(place):
    app = make_app(
        ArtefactStore([place / "blob", place / "mle"]), Limits(), ServiceOptions(reload_seconds=0)
    )
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture
def page(browser, address):
    """The page, and all that its console says and its requests ask for."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    found = opened(context, address)
    yield found
    context.close()


def opened(context, address):
    found = context.new_page()
    found.said = []
    found.asked = []
    found.on("console", lambda message: found.said.append(message.text))
    found.on("pageerror", lambda error: found.said.append(str(error)))
    found.on("request", lambda request: found.asked.append(request.url))
    found.goto(address)
    found.wait_for_selector("#model option", state="attached")
    return found


def asked(page, row):
    page.fill("#question", row["question"])
    page.fill("#options", "\n".join(row["options"]))
    page.click("#go")
    page.wait_for_selector("#verdict")


def shown(page):
    """The probabilities on the page, by option."""
    rows = page.locator("#probabilities tbody tr")
    found = {}
    for i in range(rows.count()):
        row = rows.nth(i)
        p = row.locator("td.number").get_attribute("data-p")
        found[row.locator("th").inner_text()] = float(p)
    return found


def answered(page, address, **body):
    reply = page.request.post(f"{address}v1/decisions", data=body)
    assert reply.ok
    return reply.json()


def test_a_decision_has_the_numbers_of_the_service(page, address, new):
    row = new[1]
    asked(page, row)
    line = answered(page, address, **row, include_draws=True)
    found = shown(page)
    assert list(found) == sorted(found, key=found.get, reverse=True)
    for option, p in zip(line["options"], line["probabilities"], strict=True):
        assert found[option] == pytest.approx(p, abs=1e-5)
    assert page.locator("circle.draw").count() == 3 * len(row["options"])
    verdict = page.inner_text("#verdict")
    assert verdict == (
        "To a person" if line["decision"] == "abstain" else f"Act: {line['choice_text']}"
    )
    assert f"{line['score']['value']:.3f}" in page.inner_text("#why")
    plain = answered(page, address, **row, draws=0)
    assert plain["choice_text"] in page.inner_text("#compared")
    assert f"{line['mutual_information']:.3f} nats" in page.inner_text("#answer")
    page.select_option("#draws", "5")
    page.click("#go")
    page.locator("circle.draw").nth(5 * len(row["options"]) - 1).wait_for(state="attached")
    assert "not how it was calibrated" in page.inner_text("#why")
    assert page.said == []
    assert all(url.startswith((address, "data:")) for url in page.asked)


def test_a_model_without_a_calibration_has_no_decision(page, new):
    page.select_option("#model", "mle")
    asked(page, new[0])
    assert page.inner_text("#verdict").startswith("Likeliest: ")
    assert "no calibration" in page.inner_text("#why")
    assert not page.is_visible("#compare-label")


def test_an_error_is_shown_as_one(page, new):
    asked(page, new[0])
    page.fill("#options", "red")
    page.click("#go")
    page.wait_for_selector("#error:not([hidden])")
    assert "Error: row 'row-1': got 1 option" in page.inner_text("#error")
    assert page.get_attribute("#error", "role") == "alert"
    assert page.locator("#verdict").count() == 0  # no stale answer beside it
    page.fill("#options", "red\ngreen")
    page.click("#go")
    page.wait_for_selector("#verdict")
    assert page.is_hidden("#error")


def test_a_pasted_row_fills_the_form(page, new):
    page.focus("#question")
    paste = """text => { const data = new DataTransfer(); data.setData("text", text);
        document.activeElement.dispatchEvent(new ClipboardEvent("paste",
        {clipboardData: data, bubbles: true, cancelable: true})); }"""
    page.evaluate(paste, json.dumps(new[0]))
    assert page.input_value("#question") == new[0]["question"]
    assert page.input_value("#options").split("\n") == list(new[0]["options"])


@pytest.mark.parametrize("form", ["jsonl", "csv", "tabs"])
def test_many_rows_say_which_go_to_a_person(page, address, new, form):
    lines = answered(page, address, rows=new)["rows"]
    text = "\n".join(map(json.dumps, new))
    if form != "jsonl":
        mark = "," if form == "csv" else "\t"
        text = f"question{mark}options\n"
        text += "\n".join(f'"{row["question"]}"{mark}{"|".join(row["options"])}' for row in new)
    page.click("#tab-many")
    page.fill("#data", text)
    page.click("#go-many")
    page.wait_for_selector("#tally")
    person = sum(line["decision"] == "abstain" for line in lines)
    assert page.inner_text("#tally") == f"{person} of {len(new)} rows would go to a person"
    doing = page.locator("#rows .doing").all_inner_texts()
    assert [text.strip() for text in doing[:person]] == ["⇢ to a person"] * person
    assert page.said == []


def test_the_keyboard_is_enough(page, new):
    page.focus("#tab-one")
    page.keyboard.press("ArrowRight")
    assert page.is_visible("#data")
    page.keyboard.press("ArrowLeft")
    page.fill("#options", "red\ngreen")
    page.focus("#question")
    page.keyboard.type("what is red?")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#verdict")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_nothing_is_cut_and_axe_finds_nothing(browser, address, new, size, scheme):
    width, height = SIZES[size]
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, bypass_csp=True
    )
    page = opened(context, address)
    checked(page)
    asked(page, new[1])
    checked(page)
    page.click("#tab-many")
    page.fill("#data", "\n".join(map(json.dumps, new)))
    page.click("#go-many")
    page.wait_for_selector("#tally")
    checked(page)
    context.close()


CUT = """[...document.querySelectorAll("select")].filter(list => {
    const pen = document.createElement("canvas").getContext("2d");
    pen.font = getComputedStyle(list).font;
    const room = list.clientWidth - 36;  // paddings and the arrow
    return list.offsetParent && pen.measureText(list.selectedOptions[0].text).width > room;
}).map(list => list.selectedOptions[0].text)"""


def checked(page):
    """Nothing is wider than the window, no choice is cut; axe-core has no findings."""
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(CUT) == []
    page.evaluate(axe_source())
    found = page.evaluate("axe.run()")["violations"]
    assert found == [], [(one["id"], one["nodes"][0]["html"]) for one in found]
