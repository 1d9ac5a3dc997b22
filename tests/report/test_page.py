"""The page is well formed, loads nothing, escapes everything, and says what the records say."""

import json
import re

import pytest
from recorded import Page, evaluated

from bayestune.report import read_rows, write_page

FACTS = {
    "seconds": {"fit": 12.34, "predict": 5.67},
    "peak_memory_mb": 1234,
    "versions": {"torch": "9.8.7"},
    "config": {"prior_std": 0.21},
    "train_rows": 96,
}


def written(records, folder, title="t"):
    return write_page(records, folder, title).read_text(encoding="utf-8")


def change_rows(folder, record, change):
    """Changes each row in the record's file; returns all of them."""
    rows = read_rows(record, folder)
    for i, row in enumerate(rows):
        row.update(change(i))
    (folder / record["predictions"]).write_text("\n".join(map(json.dumps, rows)))
    return rows


@pytest.mark.parametrize("count", [1, 2, 8])
def test_page_is_whole_and_loads_nothing(tmp_path, count):
    records = [evaluated(tmp_path, f"m{i}", 1 + i / 2) for i in range(count)]
    path = write_page(records, tmp_path, "A <script>alert(1)</script> title")
    assert path == tmp_path / "report.html"
    page = path.read_text(encoding="utf-8")
    parsed = Page(page)
    assert not re.search(r"https?://|<script|url\((?!#)|@import|\bsrc=", page)
    assert {"link", "img", "iframe", "object", "embed"}.isdisjoint(parsed.tags)
    links = [value for name, value in parsed.attributes if name.endswith("href")]
    assert all(value.startswith("#") for value in links)
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert parsed.tags.count("svg") == 2
    ids = [value for name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert all(f"m{i}" in parsed.text for i in range(count))
    assert "prefers-color-scheme: dark" in page


def test_page_escapes_questions_options_and_names(tmp_path):
    record = evaluated(tmp_path, "BLoB <script>x</script>", task="t")
    record |= {"task": "t<script>", "config": {"note": "</pre><script>c"}}
    asked = {"question": "<script>alert('q')", "options": ["<script>o", "</div>", "&amp;"]}
    change_rows(tmp_path, record, lambda _: asked)
    page = written([record], tmp_path)
    assert "<script" not in page
    assert "&lt;script&gt;alert(&#x27;q&#x27;)" in page
    text = Page(page).text
    assert "<script>alert('q')" in text
    assert "</pre><script>c" in text
    assert "&amp;" in text


def test_page_tells_of_configuration_and_numbers(tmp_path):
    records = [evaluated(tmp_path, "MLE", 3.0, **FACTS), evaluated(tmp_path, "BLoB", **FACTS)]
    text = Page(written(records, tmp_path)).text
    for part in ("0.21", "9.8.7", "fit 12.3, predict 5.7", "torchmetrics", "96", "1234"):
        assert part in text, part
    assert "not settled by these rows" in text
    nll = records[0]["metrics"]["nll"]
    assert f"NLL of {nll['value']:.3f} [{nll['low']:.3f}, {nll['high']:.3f}]" in text
    rows = read_rows(records[0], tmp_path)
    right = records[0]["metrics"]["accuracy"]["value"]
    gap = sum(row["confidence"] for row in rows) / 120 - right
    assert gap > 0.02  # sharpened threefold: overconfident
    assert f"on average {100 * gap:.1f} points above its accuracy" in text


def test_most_uncertain_and_most_confidently_wrong(tmp_path):
    record = evaluated(tmp_path, "MLE", 3.0)
    rows = change_rows(tmp_path, record, lambda i: {"question": f"[{i}]"})
    page = written([record], tmp_path)
    uncertain, wrong = page.split("<h2>Most uncertain questions</h2>")[1].split("<h2>Most conf")
    by_entropy = sorted(range(120), key=lambda i: -rows[i]["total_entropy"])[:10]
    assert re.findall(r'question">\[(\d+)\]', uncertain) == [str(i) for i in by_entropy]
    bad = [i for i, r in enumerate(rows) if r["probabilities"][r["answer"]] != r["confidence"]]
    by_confidence = sorted(bad, key=lambda i: -rows[i]["confidence"])[:10]
    assert re.findall(r'question">\[(\d+)\]', wrong) == [str(i) for i in by_confidence]
    total, expected = (rows[by_entropy[0]][key] for key in ("total_entropy", "expected_entropy"))
    told = f"total {total:.3f} nats, in each draw {expected:.3f}; mutual information 0.010"
    assert told in uncertain
    widths = [f'style="width:{100 * part / total:.1f}%"' for part in (expected, 0.01)]
    assert f"<i {widths[0]}></i><i {widths[1]}></i>" in uncertain


def test_missing_predictions_are_told(tmp_path):
    records = [evaluated(tmp_path, label) for label in ("MLE", "BLoB")]
    (tmp_path / records[1]["predictions"]).unlink()
    text = Page(written(records, tmp_path)).text
    told = "BLoB cannot be compared with MLE here: the predictions of BLoB are missing."
    assert told in text
    assert text.count("The predictions file of BLoB is missing.") == 3
    del records[0]["predictions"]
    text = Page(written(records, tmp_path)).text
    assert "The predictions file of MLE and BLoB is missing." in text
    assert "better in" not in text.split("Metrics")[0]


def test_seconds_that_are_not_known_are_left_out(tmp_path):
    record = evaluated(tmp_path, "MLE", seconds={"fit": None, "predict": 5.67})
    assert "<td>predict 5.7</td>" in written([record], tmp_path)


def test_page_without_records_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got no records"):
        write_page([], tmp_path, "t")
    assert not (tmp_path / "report.html").exists()
