"""Figures draw the numbers they are given."""

import subprocess
import sys

import pytest
import torch
from recorded import record, sampled_rows

from bayestune.metrics import is_right, risk_coverage
from bayestune.report import (
    risk_coverage_figure,
    save_figure,
    summary_figure,
)


def test_summary_draws_the_intervals():
    records = [record("a", accuracy=0.8, nll=0.5), record("b", accuracy=0.7, nll=0.4)]
    figure = summary_figure(records)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["ACC %", "ECE %", "NLL", "Brier"]
    lines = [tuple(line.get_xdata()) for line in figure.axes[0].lines]
    assert lines[0] == pytest.approx((79, 81))
    assert lines[1] == pytest.approx((80,))
    assert lines[3] == pytest.approx((69, 71))
    assert [text.get_text() for text in figure.axes[2].texts] == ["0.500", "0.400"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a", "b"]
    with pytest.raises(ValueError, match="got no records"):
        summary_figure([])


# Risk and coverage


def risk_of(rows):
    confidence = torch.tensor([one["confidence"] for one in rows], dtype=torch.float64)
    return risk_coverage(confidence, is_right(rows))


def test_a_line_is_the_curve_from_twenty_rows_on():
    rows = {"MLE": sampled_rows(150, 0), "BLoB": sampled_rows(150, 1)}
    runs = {name: [some] for name, some in rows.items()}
    (axes,) = risk_coverage_figure({"OBQA": runs}).axes
    assert axes.get_title(loc="left") == "OBQA"
    for line, some in zip(axes.lines, rows.values(), strict=True):
        assert line.get_ydata().tolist() == pytest.approx(risk_of(some)[19:].tolist())
        assert line.get_xdata()[0] == pytest.approx(20 / 150)
        assert line.get_xdata()[-1] == 1.0


def test_a_line_is_the_mean_over_seeds_of_any_number_of_rows():
    runs = [sampled_rows(100, 0), sampled_rows(50, 1)]
    (axes,) = risk_coverage_figure({"": {"MLE": runs}}).axes
    halves = risk_of(runs[1]).repeat_interleave(2)
    mean = ((risk_of(runs[0]) + halves) / 2)[19:]
    assert axes.lines[0].get_ydata().tolist() == pytest.approx(mean.tolist())


def test_a_method_is_drawn_alike_in_all_panels_and_no_two_alike():
    methods = {f"method {i}": [sampled_rows(30, i)] for i in range(16)}
    fewer = {name: methods[name] for name in list(methods)[5:9]}
    figure = risk_coverage_figure({"a": methods, "b": fewer, "c": methods, "d": fewer})
    looks = []
    for axes in figure.axes:
        looks.append([f"{line.get_color()} {line._dash_pattern}" for line in axes.lines])
    assert len(set(looks[0])) == 16
    assert looks[1] == looks[0][5:9]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(methods)


def test_the_legend_covers_no_curve():
    names = [f"a rather long name of a method {i}" for i in range(8)]
    figure = risk_coverage_figure({"": {name: [sampled_rows(40)] for name in names}})
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert not any(box.overlaps(axes.get_window_extent()) for axes in figure.axes)
    assert box.x1 <= figure.bbox.x1


# Files


def test_a_figure_is_saved_into_a_new_folder(tmp_path):
    path = tmp_path / "new" / "a.png"
    assert save_figure(summary_figure([record("a", accuracy=0.8)]), path) == path
    assert path.read_bytes().startswith(b"\x89PNG")


def test_matplotlib_is_imported_only_when_a_figure_is_drawn():
    code = """if True:
        import sys
        from bayestune.report import summary_figure
        assert not {"matplotlib", "transformers"} & set(sys.modules)
        summary_figure([{}])
        assert "matplotlib.pyplot" not in sys.modules
    """
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
