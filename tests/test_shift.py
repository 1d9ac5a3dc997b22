"""The shift tables by hand, what is missing, what is refused; the figure draws the curves that it says."""

import ast
import json
import re
from pathlib import Path

import pytest
import torch

from bayestune.report import shift
from bayestune.report.curves import risk_coverage_figure, risk_coverage_panels
from bayestune.report.rows import read_rows
from bayestune.report.shift import has_shift, shift_table, write_shift
from bayestune.selective import is_right, risk_coverage


def row(i, p, answer, mutual=0.0):
    """A row of which a number stands for the entropy: its order is all that counts."""
    doubt = 1 - max(p)
    entropies = {
        "total_entropy": doubt + mutual,
        "expected_entropy": doubt,
        "mutual_information": mutual,
    }
    return {"id": f"q{i}", "probabilities": p, "answer": answer, "confidence": max(p), **entropies}


FAMILIAR = [row(0, [0.9, 0.1], 0, 0.1), row(1, [0.8, 0.2], 1, 0.1), row(2, [0.7, 0.3], 0, 0.2)]
SHIFTED = [row(0, [0.75, 0.25], 1, 0.3), row(1, [0.85, 0.15], 0, 0.0)]


def record(folder, label, task, seed, rows, accuracy=0.5, **fields):
    name = f"rows-{label}-{task}-{seed}.jsonl".replace(" ", "")
    if rows is not None:
        (folder / name).write_text(
            "".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8"
        )
    values = {"accuracy": accuracy, "ece": accuracy / 10, "nll": 2 * accuracy}
    return {
        "task": task,
        "trained_on": "openbookqa",
        "model": "tiny",
        "scoring": "letter",
        "method": label.split()[0].lower(),
        "label": label,
        "draws": 10,
        "seed": seed,
        "n": len(rows or []) or 3,
        "bins": 15,
        "binning": "textbook",
        "predictions": name,
        "metrics": {key: {"value": v, "low": v, "high": v, "n": 3} for key, v in values.items()},
        **fields,
    }


@pytest.fixture
def records(tmp_path):
    """MLE with two seeds and BLoB with one, in domain and on ARC-C."""
    return [
        record(tmp_path, "MLE", "openbookqa", 1, FAMILIAR, 0.60),
        record(tmp_path, "MLE", "openbookqa", 2, FAMILIAR, 0.70),
        record(tmp_path, "MLE", "arc_challenge", 1, SHIFTED, 0.40),
        record(tmp_path, "MLE", "arc_challenge", 2, SHIFTED, 0.40),
        record(tmp_path, "BLoB N=10", "openbookqa", 1, FAMILIAR, 0.66),
        record(tmp_path, "BLoB N=10", "arc_challenge", 1, None, 0.30),
    ]


def write(folder, records):
    (folder / "records.jsonl").write_text(
        "".join(json.dumps(one) + "\n" for one in records), encoding="utf-8"
    )


def cells(text):
    """(first column, method) → the other cells, of all tables."""
    lines = [re.split(r"  +", line) for line in text.splitlines()]
    return {(line[0], line[1], len(line) - 2): line[2:] for line in lines if len(line) > 2}


def test_the_tables_by_hand(records, tmp_path):
    text = shift_table(records, tmp_path)
    assert text.splitlines()[0] == (
        "trained on OBQA · tiny · scored by letter · OBQA 3, ARC-C 2 or 3 rows · ECE in 15 bins (textbook)"
    )
    assert "Mean ± standard deviation over 2 seeds; (k): of k seeds only." in text
    table = cells(text)
    assert table["Metric", "Method", 2] == ["OBQA (in domain)", "ARC-C (small shift)"]
    assert table["ACC % ↑", "MLE", 2] == ["65.0 ± 7.1", "40.0* ± 0.0"]
    assert table["ACC % ↑", "BLoB N=10", 2] == ["66.0* (1)", "30.0 (1)"]
    assert table["ECE % ↓", "MLE", 2] == ["6.5* ± 0.7", "4.0 ± 0.0"]
    assert table["ECE % ↓", "BLoB N=10", 2] == ["6.6 (1)", "3.0* (1)"]
    assert table["NLL ↓", "BLoB N=10", 2] == ["1.320 (1)", "0.600* (1)"]
    # Errors, in domain: the wrong row's doubt 0.2 lies between 0.1 and 0.3; its mutual information ties with 0.1.
    assert table["1 − confidence", "MLE", 2] == ["50.0* ± 0.0", "100.0* ± 0.0"]
    assert table["total entropy", "BLoB N=10", 2] == ["50.0* (1)", "–"]
    assert table["mutual information", "MLE", 2] == ["25.0* ± 0.0", "100.0* ± 0.0"]
    # In-domain or not: doubts 0.25 and 0.15 against 0.1, 0.2, 0.3, of six pairs three in order; 0.3 beats all, 0 none.
    assert table["1 − confidence", "MLE", 1] == ["50.0* ± 0.0"]
    assert table["mutual information", "MLE", 1] == ["50.0* ± 0.0"]
    assert table["mutual information", "BLoB N=10", 1] == ["–"]


def test_markdown_says_the_same(records, tmp_path):
    records[4]["label"] = records[5]["label"] = "BLoB | N=10"
    text = shift_table(records, tmp_path, "markdown")
    assert (
        "| Metric | Method | OBQA (in domain) | ARC-C (small shift) |\n| --- | --- | ---: | ---: |"
        in text
    )
    assert "| ACC % ↑ | MLE | 65.0 ± 7.1 | **40.0** ± 0.0 |" in text
    assert r"| ACC % ↑ | BLoB \| N=10 | **66.0** (1) | 30.0 (1) |" in text


def test_one_seed_has_no_spread_and_one_method_no_best(records, tmp_path):
    text = shift_table([records[0], records[2]], tmp_path)
    assert "\nOne seed. –:" in text
    assert cells(text)["ACC % ↑", "MLE", 2] == ["60.0", "40.0"]


def test_columns_are_in_order_of_the_shift_and_other_tasks_come_last(records, tmp_path):
    tasks = ["boolq", "mmlu_physics", "arc_easy", "mmlu_chemistry"]
    more = [record(tmp_path, "MLE", task, 1, SHIFTED) for task in tasks]
    heads = cells(shift_table([*more, *records], tmp_path))["Score", "Method", 5]
    assert [head.split(" (")[0] for head in heads] == ["ARC-C", "ARC-E", "Chem", "Phy", "boolq"]
    assert heads[2:] == ["Chem (large shift)", "Phy (large shift)", "boolq (shifted)"]


def test_another_source_and_records_without_one(records, tmp_path):
    away = [
        record(tmp_path, "MLE", "arc_easy", 1, FAMILIAR, trained_on=None),
        record(tmp_path, "MLE", "openbookqa", 1, SHIFTED, trained_on="arc_easy"),
    ]
    text = shift_table([*records, *away], tmp_path, source="arc_easy")
    assert cells(text)["ACC % ↑", "MLE", 2] == ["50.0", "50.0"]
    assert cells(text)["Metric", "Method", 2] == ["ARC-E (in domain)", "OBQA (shifted)"]


def test_all_right_or_no_draws_to_differ_is_a_dash(tmp_path):
    rows = [row(i, [0.9 - i / 10, 0.1 + i / 10], 0) for i in range(3)]
    table = cells(shift_table([record(tmp_path, "MLE", "openbookqa", 1, rows)], tmp_path))
    assert table["total entropy", "MLE", 1] == ["–"]  # all right
    rows[0]["answer"] = 1
    table = cells(shift_table([record(tmp_path, "MLE", "openbookqa", 1, rows)], tmp_path))
    assert table["total entropy", "MLE", 1] == ["0.0"]
    assert table["mutual information", "MLE", 1] == ["–"]


def test_without_in_domain_rows_of_the_same_seed_there_is_a_dash(records, tmp_path):
    records[0]["predictions"] = "gone.jsonl"
    table = cells(shift_table(records[:4], tmp_path))
    assert table["1 − confidence", "MLE", 1] == ["50.0 (1)"]
    assert table["1 − confidence", "MLE", 2] == ["50.0 (1)", "100.0 ± 0.0"]
    assert cells(shift_table(records[2:4], tmp_path))["1 − confidence", "MLE", 1] == ["–"]


def test_a_later_record_takes_the_place_of_an_earlier_one(records, tmp_path):
    again = record(tmp_path, "MLE", "openbookqa", 2, FAMILIAR, 0.80)
    assert cells(shift_table([*records, again], tmp_path))["ACC % ↑", "MLE", 2][0] == "70.0* ± 14.1"


def test_methods_of_one_label_are_told_apart_and_models_have_their_own_tables(records, tmp_path):
    other = {**records[4], "method": "blob-small"}
    assert ("ACC % ↑", "BLoB N=10 (blob-small, 10 draws)", 2) in cells(
        shift_table([*records, other], tmp_path)
    )
    text = shift_table([*records, {**records[0], "model": "large"}], tmp_path)
    assert text.count("trained on OBQA") == 2
    assert "trained on OBQA · large · scored by letter · OBQA 3 rows" in text


def test_tables_refuse(records, tmp_path):
    with pytest.raises(
        ValueError, match=r"got style 'html'; expected one of \('text', 'markdown'\)"
    ):
        shift_table(records, tmp_path, "html")
    with pytest.raises(
        ValueError, match="got no records of methods trained on 'boolq' among 6; expected some with"
    ):
        shift_table(records, tmp_path, source="boolq")
    with pytest.raises(
        ValueError, match="got no records of methods trained on 'openbookqa' among 0"
    ):
        write_shift(tmp_path)


def test_whether_there_is_a_shift_to_tell_of(records):
    assert has_shift(records)
    assert not has_shift(records[:2])
    assert not has_shift(records, "boolq")
    assert not has_shift([])


def test_files_are_written_and_the_picture_only_with_rows(records, tmp_path):
    write(tmp_path, records)
    assert [path.name for path in write_shift(tmp_path)] == ["shift.md", "risk_coverage.png"]
    assert (tmp_path / "shift.md").read_text(encoding="utf-8") == shift_table(
        records, tmp_path, "markdown"
    ) + "\n"
    assert (tmp_path / "risk_coverage.png").read_bytes()[:4] == b"\x89PNG"
    bare = tmp_path / "bare"
    bare.mkdir()
    write(bare, [*records, {**records[0], "model": "large"}])
    assert write_shift(bare) == [bare / "shift.md"]
    assert "–" in (bare / "shift.md").read_text(encoding="utf-8")


def test_two_models_share_the_picture_and_not_a_panel(records, tmp_path, monkeypatch):
    from bayestune.report import curves

    seen, figure = {}, risk_coverage_figure({"MLE": FAMILIAR})
    monkeypatch.setattr(
        curves, "risk_coverage_panels", lambda panels: seen.update(panels) or figure
    )
    write(tmp_path, [*records, {**records[0], "model": "large"}])
    write_shift(tmp_path)
    shared = "letter · 15 · textbook"
    assert list(seen) == [
        f"tiny · {shared} · OBQA (in domain)",
        f"tiny · {shared} · ARC-C (small shift)",
        f"large · {shared} · OBQA (in domain)",
    ]
    assert {name: len(runs) for name, runs in next(iter(seen.values())).items()} == {
        "MLE": 2,
        "BLoB N=10": 1,
    }


def test_rows_are_read_as_written(records, tmp_path):
    assert read_rows(records[0], tmp_path) == FAMILIAR
    assert read_rows(records[5], tmp_path) == read_rows({}, tmp_path) == []


# The figure


def many(n, seed, ties=False):
    g = torch.Generator().manual_seed(seed)
    p = torch.randn(n, 3, generator=g, dtype=torch.float64).mul(2).softmax(1)
    answers = torch.multinomial(p, 1, generator=g)[:, 0].tolist()
    return [
        row(i, [round(x, 1 if ties else 9) for x in p[i].tolist()], answers[i]) for i in range(n)
    ]


def curve(rows):
    return risk_coverage(
        torch.tensor([one["confidence"] for one in rows], dtype=torch.float64), is_right(rows)
    )


def test_a_line_is_the_curve_from_twenty_rows_on():
    rows = {"MLE": many(150, 0, ties=True), "BLoB": many(150, 1)}
    (axes,) = risk_coverage_figure(rows, "OBQA").axes
    assert axes.get_title(loc="left") == "OBQA"
    for line, one in zip(axes.lines, rows.values(), strict=True):
        assert line.get_ydata().tolist() == pytest.approx(curve(one).risk[19:].tolist())
        assert line.get_xdata()[0] == pytest.approx(20 / 150)
        assert line.get_xdata()[-1] == 1.0


def test_a_line_is_the_mean_over_seeds():
    runs = [many(100, seed) for seed in range(3)]
    (axes,) = risk_coverage_panels({"": {"MLE": runs}}).axes
    mean = torch.stack([curve(rows).risk for rows in runs]).mean(0)[19:]
    assert axes.lines[0].get_ydata().tolist() == pytest.approx(mean.tolist())
    (axes,) = risk_coverage_panels({"": {"MLE": [runs[0], runs[1][:50]]}}).axes
    halves = curve(runs[1][:50]).risk.repeat_interleave(2)
    assert axes.lines[0].get_ydata().tolist() == pytest.approx(
        ((curve(runs[0]).risk + halves) / 2)[19:].tolist()
    )


def test_a_method_is_drawn_alike_in_all_panels_and_no_two_alike():
    methods = {f"method {i}": [many(30, i)] for i in range(16)}
    fewer = {name: methods[name] for name in list(methods)[5:9]}
    figure = risk_coverage_panels({"a": methods, "b": fewer, "c": methods, "d": fewer})
    looks = [
        [(line.get_color(), str(line.get_linestyle()), line._dash_pattern) for line in a.lines]
        for a in figure.axes
    ]
    assert len({str(look) for look in looks[0]}) == 16
    assert looks[1] == looks[0][5:9]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(methods)


def test_the_legend_covers_no_curve():
    figure = risk_coverage_figure(
        {f"a rather long name of a method {i}": many(40, i) for i in range(8)}
    )
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert not any(box.overlaps(axes.get_window_extent()) for axes in figure.axes)
    assert box.x1 <= figure.bbox.x1


def test_the_figure_refuses():
    with pytest.raises(
        ValueError, match="got 0 panels, 0 methods without rows; expected a panel at least"
    ):
        risk_coverage_panels({})
    with pytest.raises(ValueError, match="got 1 panels, 1 methods without rows"):
        risk_coverage_figure({"MLE": many(20, 0), "BLoB": []})
    with pytest.raises(ValueError, match="got 1 panels, 0 methods without rows"):
        risk_coverage_figure({})


def test_the_tables_do_without_matplotlib():
    tree = ast.parse(Path(shift.__file__).read_text(encoding="utf-8"))
    names = [
        alias.name
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    ]
    assert "read_rows" in names
    assert not {"curves", "plots", "matplotlib"} & set(names)
