"""Reports: what is marked and claimed follows from the numbers; the page is well formed and loads nothing."""

import json
import re
import subprocess
import sys
from dataclasses import asdict
from html.parser import HTMLParser

import pytest
import torch

from bayestune import metrics
from bayestune.report import plots, render_table, write_page
from bayestune.report.page import _compare, _read, _sentence, _verdict
from bayestune.report.table import COLUMNS, grouped, heading, names

VOID = {"meta", "br", "hr", "img", "link", "input"}
COLUMN = {column.key: column for column in COLUMNS}


def evaluate(folder, label, sharpness=1.0, noise=0.0, seed=0, n=120, **fields):
    """A record and its file of rows: calibrated but for a sharpness and noise."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, 3, generator=g, dtype=torch.float64) * 2
    y = torch.multinomial(z.softmax(1), 1, generator=g)[:, 0]
    p = ((z + noise * torch.randn(n, 3, generator=g, dtype=torch.float64)) * sharpness).softmax(1)
    total = torch.special.entr(p).sum(1)
    path = f"rows-{re.sub('[^a-z0-9]', '', label.lower())}-{seed}.jsonl"
    rows = [
        {
            "id": f"q{i}",
            "question": f"Is <b>{i}</b> & more?",
            "options": ["yes", "no", "<maybe>"],
            "answer": int(y[i]),
            "probabilities": p[i].tolist(),
            "confidence": p[i].max().item(),
            "total_entropy": total[i].item(),
            "expected_entropy": 0.75 * total[i].item(),
            "mutual_information": 0.25 * total[i].item(),
        }
        for i in range(n)
    ]
    (folder / path).write_text("\n".join(map(json.dumps, rows)) + "\n")
    summary = metrics.summarise(p, y, resamples=100)
    return {
        "task": "arc_easy",
        "model": "tiny",
        "method": label,
        "draws": 10,
        "label": label,
        "scoring": "text",
        "seed": 1,
        "n": n,
        "bins": 15,
        "binning": "torchmetrics",
        "metrics": {key: asdict(interval) for key, interval in summary.items()},
        "seconds": {"fit": 12.34, "predict": 5.67},
        "peak_memory_mb": 1234.5,
        "predictions": path,
        "versions": {"torch": "9.8.7"},
        "config": {"prior_std": 0.21},
        "train_rows": 96,
        **fields,
    }


def plain(label, **values):
    """A record without rows; an interval of ±0.01 about each value."""
    cells = {
        key: {"value": v, "low": v - 0.01, "high": v + 0.01, "n": 300} for key, v in values.items()
    }
    shared = {"task": "t", "model": "m", "n": 300, "bins": 15, "binning": "textbook"}
    return {"label": label, "metrics": cells, **shared}


class Balanced(HTMLParser):
    """Raises on tags that do not match; collects attributes and text."""

    def __init__(self, page):
        super().__init__()
        self.stack, self.attributes, self.tags, self.words = [], [], [], []
        self.feed(page)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


# Table


def test_table_has_a_line_per_record_and_marks_the_best():
    records = [
        plain("MLE", accuracy=0.80, nll=0.9, brier=0.5, ece=0.12, ece_debiased=0.10, aurc=0.2),
        plain(
            "BLoB N=10", accuracy=0.79, nll=0.4, brier=0.3, ece=0.04, ece_debiased=0.02, aurc=0.2
        ),
    ]
    lines = render_table(records).splitlines()
    assert lines[0] == "t · m · 300 rows · ECE in 15 bins (textbook)"
    assert re.split(r"  +", lines[2]) == [
        "Method",
        *("ACC % ↑", "ECE % ↓", "ECE debiased % ↓", "NLL ↓", "Brier ↓", "AURC ↓"),
    ]
    assert re.split(r"  +", lines[4]) == [
        "MLE",
        *("80.0* [79.0, 81.0]", "12.0 [11.0, 13.0]", "10.0 [9.0, 11.0]"),
        *("0.900 [0.890, 0.910]", "0.500 [0.490, 0.510]", "0.200* [0.190, 0.210]"),
    ]
    assert re.split(r"  +", lines[5])[1:] == [
        *("79.0 [78.0, 80.0]", "4.0* [3.0, 5.0]", "2.0* [1.0, 3.0]"),
        *("0.400* [0.390, 0.410]", "0.300* [0.290, 0.310]", "0.200* [0.190, 0.210]"),
    ]
    assert len(lines) == 6


def test_markdown_table():
    records = [plain("a|b", accuracy=0.5), plain("c", accuracy=0.75)]
    lines = render_table(records, "markdown").splitlines()
    assert lines[2].startswith("| Method | ACC % ↑ | ECE % ↓ |")
    assert lines[3] == "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    assert lines[4] == r"| a\|b | 50.0 [49.0, 51.0] | – | – | – | – | – |"
    assert lines[5] == "| c | **75.0** [74.0, 76.0] | – | – | – | – | – |"


@pytest.mark.parametrize("style", ["text", "markdown", "html"])
def test_one_record_has_no_best(style):
    text = render_table([plain("MLE", accuracy=0.8, nll=0.9)], style)
    assert not re.search(r"\*|best", text)
    assert "80.0" in text


def test_what_is_printed_alike_is_as_good():
    text = render_table([plain("a", nll=0.50001), plain("b", nll=0.49999)])
    assert text.count("0.500*") == 2


def test_tables_are_split_where_values_do_not_compare():
    records = [
        plain("a", nll=1.0),
        plain("b", nll=2.0) | {"task": "u"},
        plain("c", nll=3.0),
        plain("d", nll=4.0),
    ]
    records[3]["bins"] = 10
    assert [[r["label"] for r in group] for group in grouped(records)] == [["a", "c"], ["b"], ["d"]]
    text = render_table(records)
    assert text.count("Method") == 3
    assert text.count("*") == 1
    assert "1.000*" in text


def test_names_tell_records_apart():
    record = {"label": "BLoB", "task": "t", "model": "m", "scoring": "text", "seed": 1}
    assert names([record]) == ["BLoB"]
    assert names([record, record | {"seed": 2}]) == ["BLoB, seed 1", "BLoB, seed 2"]
    assert names([record, record | {"task": "u"}]) == ["BLoB, t", "BLoB, u"]
    assert names([record, record | {"scoring": "letter"}]) == ["BLoB, by text", "BLoB, by letter"]


def test_heading_says_what_is_known():
    assert heading({"task": "t"}) == "t · ECE in ? bins (binning unknown)"
    assert heading(
        {"task": "t", "model": "m", "scoring": "text", "n": 3, "bins": 15, "binning": "textbook"}
    ) == ("t · m · scored by text · 3 rows · ECE in 15 bins (textbook)")


def test_nan_is_a_dash_and_never_the_best():
    records = [plain("a", nll=float("nan")), plain("b", nll=2.0)]
    assert "– [–, –]" in render_table(records)
    assert "2.000*" in render_table(records)


def test_table_refusals():
    with pytest.raises(ValueError, match="got no records; expected one per evaluated method"):
        render_table([])
    with pytest.raises(ValueError, match="got style 'latex'; expected one of"):
        render_table([plain("a")], "latex")


# Figures


def diagram(sharpness=1.0):
    g = torch.Generator().manual_seed(0)
    p = (torch.randn(200, 4, generator=g) * 2).softmax(1)
    y = torch.multinomial(p, 1, generator=g)[:, 0]
    return metrics.reliability((p.log() * sharpness).softmax(1), y)


@pytest.mark.parametrize("panels", [1, 2, 5, 8])
def test_reliability_figure_draws_each_method(panels):
    figure = plots.reliability_figure(
        [f"m{i}" for i in range(panels)], [diagram()] * panels, ["ECE"] * panels
    )
    assert len(figure.axes) == 2 * panels
    assert [axes.get_title(loc="left") for axes in figure.axes[::2]] == [
        f"m{i}" for i in range(panels)
    ]
    assert len({axes.get_ylim() for axes in figure.axes[1::2]}) == 1


def test_reliability_bars_are_the_numbers():
    one = diagram(sharpness=2)
    figure = plots.reliability_figure(["m"], [one])
    upper, lower = figure.axes
    used = one.counts > 0
    solid, over, under = upper.containers
    lesser = torch.minimum(one.accuracy, one.confidence)[used]
    gap = (one.confidence - one.accuracy)[used]
    assert [bar.get_height() for bar in solid] == pytest.approx(lesser.tolist())
    assert [bar.get_height() for bar in over] == pytest.approx(gap[gap > 0].tolist())
    assert [bar.get_height() for bar in under] == pytest.approx((-gap[gap < 0]).tolist())
    assert len(over) > len(under)  # sharpened: overconfident
    assert [bar.get_height() for bar in lower.containers[0]] == pytest.approx(
        (one.counts / 200).tolist()
    )
    accuracy, confidence = (line.get_xdata()[0] for line in lower.lines)
    assert accuracy < confidence
    assert confidence - accuracy == pytest.approx((gap * one.counts[used]).sum().item() / 200)


def test_summary_figure_draws_the_intervals():
    figure = plots.summary_figure(
        [plain("a", accuracy=0.8, nll=0.5), plain("b", accuracy=0.7, nll=0.4)]
    )
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "ACC %",
        "ECE %",
        "NLL",
        "Brier",
    ]
    lines = [tuple(line.get_xdata()) for line in figure.axes[0].lines]
    assert lines[0] == pytest.approx((79, 81))
    assert lines[1] == pytest.approx((80,))
    assert lines[3] == pytest.approx((69, 71))
    assert [text.get_text() for text in figure.axes[2].texts] == ["0.500", "0.400"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a", "b"]


def test_save(tmp_path):
    figure = plots.summary_figure([plain("a", accuracy=0.8)])
    png, svg = (
        plots.save(figure, tmp_path / "new" / "a.png"),
        plots.save(figure, tmp_path / "a.svg"),
    )
    assert png.read_bytes().startswith(b"\x89PNG")
    first = svg.read_bytes()
    assert b"<svg" in first
    assert plots.save(figure, svg).read_bytes() == first
    with pytest.raises(ValueError, match=r"got the ending '.pdf'; expected .png or .svg"):
        plots.save(figure, tmp_path / "a.pdf")


def test_figure_refusals():
    with pytest.raises(ValueError, match="got 0 titles, 0 diagrams"):
        plots.reliability_figure([], [])
    with pytest.raises(ValueError, match="got 2 titles, 1 diagrams, 2 captions"):
        plots.reliability_figure(["a", "b"], [diagram()])
    with pytest.raises(ValueError, match="got no records"):
        plots.summary_figure([])


def test_inline_svg_takes_its_colours_from_the_page():
    svg = plots.inline_svg(plots.summary_figure([plain('a <"&', accuracy=0.8)]), 'a "label" <')
    assert svg.startswith('<svg role="img" aria-label="a &quot;label&quot; &lt;"')
    assert "var(--ink)" in svg
    assert not re.search(r"#1f2328|#ffffff|https?:|<script|DOCTYPE|<!--", svg)
    assert 'a <"&' in Balanced(svg).text
    assert 'viewBox="0 0' in svg


def test_matplotlib_is_imported_by_plots_only():
    code = """if True:
        import sys, bayestune.report
        assert "matplotlib" not in sys.modules
        import bayestune.report.plots
        assert "matplotlib.pyplot" not in sys.modules
    """
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Page


@pytest.mark.parametrize("count", [1, 2, 8])
def test_page_is_whole_and_loads_nothing(tmp_path, count):
    records = [evaluate(tmp_path, f"m{i}", 1 + i / 2) for i in range(count)]
    path = write_page(records, tmp_path, "A <script>alert(1)</script> title")
    assert path == tmp_path / "report.html"
    page = path.read_text(encoding="utf-8")
    parsed = Balanced(page)
    assert not re.search(r"https?://|<script|url\((?!#)|@import|\bsrc=", page)
    assert {"link", "img", "iframe", "object", "embed"}.isdisjoint(parsed.tags)
    assert not [
        value
        for name, value in parsed.attributes
        if name.endswith("href") and not value.startswith("#")
    ]
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert parsed.tags.count("svg") == 2
    ids = [value for name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert all(f"m{i}" in parsed.text for i in range(count))
    assert "prefers-color-scheme: dark" in page


def test_page_escapes_questions_options_and_names(tmp_path):
    record = evaluate(tmp_path, "BLoB <script>x</script>", task="t<script>")
    rows = [
        json.loads(line) for line in (tmp_path / record["predictions"]).read_text().splitlines()
    ]
    for row in rows:
        row |= {
            "question": "<script>alert('q')</script>",
            "options": ["<script>o", "</div>", "&amp;"],
        }
    (tmp_path / record["predictions"]).write_text("\n".join(map(json.dumps, rows)))
    record["config"] = {"note": "</pre><script>c"}
    page = write_page([record], tmp_path, "t").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;alert(&#x27;q&#x27;)" in page
    text = Balanced(page).text
    assert "<script>alert('q')</script>" in text
    assert "</pre><script>c" in text
    assert "&amp;" in text


def test_page_tells_of_configuration_and_numbers(tmp_path):
    records = [evaluate(tmp_path, "MLE", 3.0), evaluate(tmp_path, "BLoB")]
    text = Balanced(write_page(records, tmp_path, "t").read_text(encoding="utf-8")).text
    for part in (
        "0.21",
        "9.8.7",
        "fit 12.3, predict 5.7",
        "torchmetrics",
        "96",
        "1234",
        "not settled by these rows",
    ):
        assert part in text, part
    nll = records[0]["metrics"]["nll"]
    assert f"NLL of {nll['value']:.3f} [{nll['low']:.3f}, {nll['high']:.3f}]" in text
    rows = [
        json.loads(line) for line in (tmp_path / records[0]["predictions"]).read_text().splitlines()
    ]
    gap = sum(row["confidence"] for row in rows) / 120 - records[0]["metrics"]["accuracy"]["value"]
    assert gap > 0.02  # sharpened threefold: overconfident
    assert f"on average {100 * gap:.1f} points above its accuracy" in text


def test_most_uncertain_and_most_confidently_wrong(tmp_path):
    record = evaluate(tmp_path, "MLE", 3.0)
    rows = [
        json.loads(line) for line in (tmp_path / record["predictions"]).read_text().splitlines()
    ]
    for i, row in enumerate(rows):
        row["question"] = f"[{i}]"
    (tmp_path / record["predictions"]).write_text("\n".join(map(json.dumps, rows)))
    page = write_page([record], tmp_path, "t").read_text(encoding="utf-8")
    uncertain, wrong = page.split("<h2>Most uncertain questions</h2>")[1].split(
        "<h2>Most confidently wrong</h2>"
    )
    by_entropy = sorted(range(120), key=lambda i: -rows[i]["total_entropy"])[:10]
    assert re.findall(r'question">\[(\d+)\]', uncertain) == [str(i) for i in by_entropy]
    bad = [
        i
        for i in range(120)
        if rows[i]["probabilities"][rows[i]["answer"]] != rows[i]["confidence"]
    ]
    by_confidence = sorted(bad, key=lambda i: -rows[i]["confidence"])[:10]
    assert re.findall(r'question">\[(\d+)\]', wrong) == [str(i) for i in by_confidence]
    total = rows[by_entropy[0]]["total_entropy"]
    assert (
        f"total {total:.3f} = expected {0.75 * total:.3f} + mutual information {0.25 * total:.3f} nats"
        in uncertain
    )
    assert 'style="width:75.0%"></i><i style="width:25.0%"' in uncertain


def test_missing_predictions_are_told(tmp_path):
    records = [evaluate(tmp_path, label) for label in ("MLE", "BLoB")]
    (tmp_path / records[1]["predictions"]).unlink()
    text = Balanced(write_page(records, tmp_path, "t").read_text(encoding="utf-8")).text
    assert "BLoB cannot be compared with MLE here: the predictions of BLoB are missing." in text
    assert text.count("The predictions file of BLoB is missing.") == 3
    (tmp_path / records[0]["predictions"]).unlink()
    del records[0]["predictions"]
    text = Balanced(write_page(records, tmp_path, "t").read_text(encoding="utf-8")).text
    assert "The predictions file of MLE and BLoB is missing." in text
    assert "better in" not in text.split("Metrics")[0]


def test_page_without_records_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got no records"):
        write_page([], tmp_path, "t")
    assert not (tmp_path / "report.html").exists()


# Claims


def read(folder, record):
    return _read(record["label"], record, folder)


def test_claims_follow_the_intervals(tmp_path):
    good, bad = evaluate(tmp_path, "good", n=400), evaluate(tmp_path, "bad", 6.0, n=400)
    first, other = read(tmp_path, bad), read(tmp_path, good)
    compared = _compare(first, other)
    assert compared["nll"].difference == pytest.approx(
        good["metrics"]["nll"]["value"] - bad["metrics"]["nll"]["value"], abs=1e-12
    )
    size = f"{-compared['nll'].difference:.3f}"
    points = f"{-100 * compared['ece'].difference:.1f}"
    assert _sentence(first, other, compared) == (
        f"good against bad on the same 400 questions: better in calibration error (ECE) (by {points} points), "
        f"NLL (by {size}) and Brier score (by {-compared['brier'].difference:.3f}); "
        "not settled by these rows: accuracy."
    )
    turned = _sentence(other, first, _compare(other, first))
    assert turned.startswith(
        "bad against good on the same 400 questions: worse in calibration error (ECE) (by "
    )
    assert "better" not in turned


def test_equal_methods_are_not_told_apart(tmp_path):
    one, two = (read(tmp_path, evaluate(tmp_path, label)) for label in ("a", "b"))
    sentence = _sentence(one, two, _compare(one, two))
    assert sentence == (
        "b against a on the same 120 questions: "
        "not settled by these rows: accuracy, calibration error (ECE), NLL and Brier score."
    )


@pytest.mark.parametrize(
    ("key", "low", "high", "p", "expected"),
    [
        ("nll", -0.3, -0.1, 0.01, 1),
        ("nll", 0.1, 0.3, 0.01, -1),
        ("accuracy", 0.1, 0.3, 0.01, 1),
        ("accuracy", -0.3, -0.1, 0.01, -1),
        ("nll", -0.3, 0.1, 0.01, 0),
        ("nll", -0.3, -0.1, 0.06, 0),
        ("nll", 0.0, 0.3, 0.01, 0),
    ],
)
def test_verdict_needs_the_interval_and_p(key, low, high, p, expected):
    paired = metrics.PairedDifference((low + high) / 2, low, high, p, 100)
    assert _verdict(COLUMN[key], paired) == expected


def test_only_shared_rows_of_one_task_are_compared(tmp_path):
    full, part = evaluate(tmp_path, "full"), evaluate(tmp_path, "part", 2.0)
    lines = (tmp_path / part["predictions"]).read_text().splitlines()
    (tmp_path / part["predictions"]).write_text("\n".join(reversed(lines[:50])))
    whole = read(tmp_path, full)
    compared = _compare(whole, read(tmp_path, part))
    assert {paired.n for paired in compared.values()} == {50}
    answers = [row["probabilities"][row["answer"]] for row in map(json.loads, lines[:50])]
    mine = [row["probabilities"][row["answer"]] for row in whole.rows[:50]]
    expected = (
        (torch.tensor(mine).double().log() - torch.tensor(answers).double().log()).mean().item()
    )
    assert compared["nll"].difference == pytest.approx(expected, abs=1e-6)
    assert "different tasks" in _compare(whole, read(tmp_path, part | {"task": "other"}))
    renamed = [json.dumps(json.loads(line) | {"id": f"z{i}"}) for i, line in enumerate(lines)]
    (tmp_path / part["predictions"]).write_text("\n".join(renamed))
    assert "no row in common" in _compare(whole, read(tmp_path, part))


def test_rows_of_unequal_length_are_padded(tmp_path):
    record = evaluate(tmp_path, "MLE")
    rows = [
        json.loads(line) for line in (tmp_path / record["predictions"]).read_text().splitlines()
    ]
    for row in rows[::2]:
        row |= {"options": ["a", "b", "c", "d"], "probabilities": [*row["probabilities"], 0.0]}
    (tmp_path / record["predictions"]).write_text("\n".join(map(json.dumps, rows)))
    same = _compare(read(tmp_path, record), read(tmp_path, evaluate(tmp_path, "BLoB")))
    assert same["nll"].difference == 0
    write_page([record], tmp_path, "t")
