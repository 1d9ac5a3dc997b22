"""Records and rows → pictures: intervals of metrics, risk–coverage curves."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayestune.metrics import Row, is_right, risk_coverage
from bayestune.report.columns import ACCURACY, BRIER, CALIBRATED, ECE, NLL, Column
from bayestune.report.comparable import names
from bayestune.report.picture_style import BLUE, FAINT, INK, PAPER, VERMILLION, styled_figure
from bayestune.report.rows import Record
from bayestune.report.summary import summary_tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DASHED: Any = {"color": FAINT, "linestyle": (0, (4, 3))}
# Okabe, Ito (2008) without the yellow, which is too pale for a line; a second round of them is
# dashed, a third dotted.
_COLOURS = (INK, BLUE, VERMILLION, "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1.2)))
_NOISY = 20  # the error rate of fewer rows jumps, and would set the scale
_PERCENT = "{x:.0%}"

Runs = Sequence[Sequence[Row]]  # a method's rows, once for each seed


def _draw_range(
    axes: Axes, ends: tuple[float, float] | None, column: Column, y: float, look: Any
) -> None:
    """A horizontal line from end to end; none without ends."""
    if ends is not None:
        scaled = [end * column.scale for end in ends]
        axes.plot(scaled, [y, y], solid_capstyle="butt", **look)


def _draw_intervals(axes: Axes, column: Column, records: Sequence[Record]) -> None:
    """A point and its interval for each record, and a thin vertical line at the first one's value.

    Under an ECE lies what a calibrated model would score, in grey.
    """
    for y, record in enumerate(records):
        metric = column.of(record)
        if not metric:
            continue
        value = metric["value"] * column.scale
        _draw_range(axes, column.interval(record), column, y, {"color": INK, "linewidth": 1.6})
        axes.plot([value], [y], marker="o", markersize=5, color=INK, linestyle="none")
        text = column.number(metric["value"])
        number = axes.annotate(text, (value, y), (0, 6), textcoords="offset points", ha="center")
        number.set_bbox({"facecolor": PAPER, "edgecolor": "none", "pad": 0.6})
        if y == 0 and len(records) > 1:
            axes.axvline(value, linewidth=0.8, zorder=0, **_DASHED)
        if column == ECE:
            calibrated = CALIBRATED.interval(record)
            _draw_range(axes, calibrated, column, y + 0.2, {"color": FAINT, "linewidth": 3})
    axes.set_title(column.title, loc="left")
    direction = "higher is better →" if column.sign > 0 else "← lower is better"
    axes.set_xlabel(direction + ("; grey: if calibrated" if column == ECE else ""))
    axes.set(ylim=(len(records) - 0.45, -0.65), yticks=range(len(records)))
    axes.margins(x=0.12)
    axes.locator_params("x", nbins=4, steps=None)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def summary_figure(records: Sequence[Record]) -> Figure:
    """Accuracy, ECE, NLL and Brier score with their intervals, a panel each.

    Args:
        records: one for each evaluated method; the others are read against the first.

    Raises:
        Refusal: if there are no records.
    """
    tables = summary_tables(records)
    shown = (ACCURACY, ECE, NLL, BRIER)
    with styled_figure(9.2, 1.25 + 0.42 * len(records), wspace=0.06) as figure:
        panels = figure.subplots(1, len(shown), sharey=True)
        for axes, column in zip(panels, shown, strict=True):
            _draw_intervals(axes, column, records)
        panels[0].set_yticklabels([textwrap.fill(name, 24) for name in names(records)])
        heading = tables[0].caption if len(tables) == 1 else ""
        figure.suptitle(heading, x=0.01, ha="left", fontsize=8.5, color=INK)
    return figure


def _mean_risk(runs: Runs) -> Tensor:
    """The mean risk over seeds at each coverage, or at the nearest one above that a seed has."""
    curves = []
    for rows in runs:
        confidence = torch.tensor([row["confidence"] for row in rows], dtype=torch.float64)
        curves.append(risk_coverage(confidence, is_right(rows)))
    n = max(map(len, curves))
    # The k-th of n points takes the place ⌈k·m/n⌉ of m: itself where all have as many rows.
    k = torch.arange(1, n + 1)
    return torch.stack([risk[(k * len(risk) + n - 1) // n - 1] for risk in curves]).mean(0)


def _draw_curves(axes: Axes, methods: Mapping[str, Runs], order: Sequence[str]) -> dict[str, Any]:
    """Draws the line of each method, whose place in the order gives its look; returns the lines."""
    lines = {}
    for name, runs in methods.items():
        risk = _mean_risk(runs)
        coverage = torch.arange(1, len(risk) + 1).double() / len(risk)
        start = max(1, min(_NOISY, len(risk) // 5)) - 1
        dash, colour = divmod(order.index(name), len(_COLOURS))
        look: Any = {"color": _COLOURS[colour], "linestyle": _DASHES[dash % len(_DASHES)]}
        (lines[name],) = axes.plot(coverage[start:], risk[start:], linewidth=1.5, **look)
    axes.set(xlim=(0, 1), ylim=(0, None), xticks=[0, 0.25, 0.5, 0.75, 1])
    axes.set_xlabel("coverage: share of rows answered")
    axes.xaxis.set_major_formatter(_PERCENT)
    axes.yaxis.set_major_formatter(_PERCENT)
    axes.locator_params("y", nbins=5, steps=[1, 2, 5, 10])
    return lines


def risk_coverage_figure(panels: Mapping[str, Mapping[str, Runs]]) -> Figure:
    """Error rate among the most confident rows against their share, a line for each method.

    A line is the mean over seeds, and starts where 20 rows (of few rows, a fifth) are answered. A
    method has the same line in every panel; the legend is below them.

    Args:
        panels: title → name of a method → its rows, once for each seed; none of them empty.

    Reference: El-Yaniv, Wiener (2010), https://jmlr.org/papers/v11/el-yaniv10a.html
    """
    order = list(dict.fromkeys(name for methods in panels.values() for name in methods))
    columns = min(len(panels), 3)
    panel_rows = math.ceil(len(panels) / columns)
    fitting = int(15 * columns / max(map(len, order)) + columns)  # by the longest name
    legend_columns = max(1, min(len(order), 2 * columns, fitting))
    legend_lines = math.ceil(len(order) / legend_columns)
    height = 2.75 * panel_rows + 0.2 * legend_lines + 0.1  # inches
    lines: dict[str, Any] = {}
    with styled_figure(3.0 * columns + 0.4, height) as figure:
        grid = figure.subplots(panel_rows, columns, squeeze=False).ravel()
        for i, (title, methods) in enumerate(panels.items()):
            lines |= _draw_curves(grid[i], methods, order)
            grid[i].set_title(textwrap.fill(title, 40), loc="left")
            grid[i].set_ylabel("risk: error rate among them" if i % columns == 0 else "")
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        place: Any = {"loc": "outside lower left", "ncols": legend_columns}
        figure.legend(lines.values(), lines.keys(), handlelength=2.4, **place)
    return figure
