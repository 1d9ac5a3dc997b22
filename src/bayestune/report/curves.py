"""Rows → risk–coverage curves. Needs matplotlib, as `bayestune.report.plots`, whose style it shares."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from bayestune.report.plots import BLUE, INK, STYLE, VERMILLION
from bayestune.selective import RiskCoverage, Row, is_right, risk_coverage

# Okabe, Ito (2008) without the yellow, which is too pale for a line; a second round of them is dashed, a third dotted.
COLOURS = (INK, BLUE, VERMILLION, "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1.2)))
_PER_ROW = 3
_NOISY = 20  # the error rate of fewer rows jumps, and would set the scale

Runs = Sequence[Sequence[Row]]  # a method's rows, once for each seed


def _mean_curve(runs: Runs) -> RiskCoverage:
    """The mean over seeds of the curves at each coverage; of unlike numbers of rows, at the nearest point above."""
    curves = []
    for rows in runs:
        confidence = torch.tensor([row["confidence"] for row in rows], dtype=torch.float64)
        curves.append(risk_coverage(confidence, is_right(rows)))
    longest = max(curves, key=lambda curve: len(curve.risk))
    n = len(longest.risk)
    # The k-th of n points takes the place ⌈k·m/n⌉ of m: itself where all have as many rows, as they should.
    places = [(torch.arange(1, n + 1) * len(c.risk) + n - 1) // n - 1 for c in curves]
    return RiskCoverage(
        longest.coverage,
        torch.stack([c.risk[p] for c, p in zip(curves, places, strict=True)]).mean(0),
    )


def _style(index: int) -> dict[str, Any]:
    dash = _DASHES[index // len(COLOURS) % len(_DASHES)]
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": dash, "linewidth": 1.5}


def _draw(axes: Axes, title: str, methods: Mapping[str, Runs], order: Sequence[str]) -> None:
    for name, runs in methods.items():
        curve = _mean_curve(runs)
        start = max(1, min(_NOISY, len(curve.risk) // 5)) - 1
        axes.plot(
            curve.coverage[start:].numpy(), curve.risk[start:].numpy(), **_style(order.index(name))
        )
    axes.set_title("\n".join(textwrap.wrap(title, 40)), loc="left")
    axes.set(
        xlim=(0, 1),
        ylim=(0, None),
        xticks=[0, 0.25, 0.5, 0.75, 1],
        xlabel="coverage: share of rows answered",
    )
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))


def risk_coverage_panels(panels: Mapping[str, Mapping[str, Runs]]) -> Figure:
    """Error rate among the most confident rows against their share, a panel per data set and a line per method.

    A line is the mean over seeds, and starts where 20 rows (of few rows, a fifth) are answered.

    Args:
        panels: title → name of a method → its rows, once for each seed. A method has the same line in every panel.

    Returns:
        A figure with its legend below the panels.

    Raises:
        ValueError: if there are no panels, or a panel, a method or a seed has no rows.

    Reference: El-Yaniv, Wiener (2010), https://jmlr.org/papers/v11/el-yaniv10a.html
    """
    filled = [
        all(runs) and len(runs) > 0 for methods in panels.values() for runs in methods.values()
    ]
    if not filled or not all(filled) or not all(panels.values()):
        got = f"{len(panels)} panels, {filled.count(False)} methods without rows"
        raise ValueError(
            f"got {got}; expected a panel at least, and rows in each; leave out what has no rows"
        )
    order = list(dict.fromkeys(name for methods in panels.values() for name in methods))
    columns = min(len(panels), _PER_ROW)
    bands = -(-len(panels) // columns)
    keys = max(
        1, min(len(order), 2 * columns, int(15 * columns / max(map(len, order)) + columns))
    )  # in a line
    with matplotlib.rc_context(STYLE):
        height = 2.75 * bands + 0.2 * -(-len(order) // keys) + 0.1  # inches
        figure = Figure(figsize=(3.0 * columns + 0.4, height), layout="constrained")
        grid = figure.subplots(bands, columns, squeeze=False).ravel()
        for i, axes in enumerate(grid):
            if i < len(panels):
                title = list(panels)[i]
                _draw(axes, title, panels[title], order)
                axes.set_ylabel("risk: error rate among them" if i % columns == 0 else "")
            else:
                axes.set_axis_off()
        lines = [Line2D([], [], label=name, **_style(i)) for i, name in enumerate(order)]
        figure.legend(handles=lines, loc="outside lower left", ncols=keys, handlelength=2.4)
    return figure


def risk_coverage_figure(named_rows: Mapping[str, Sequence[Row]], title: str = "") -> Figure:
    """`risk_coverage_panels` of one data set and one seed.

    Args:
        named_rows: name of a method → its rows.
        title: of the panel.

    Returns:
        A figure.

    Raises:
        ValueError: if there are no methods, or one has no rows.
    """
    return risk_coverage_panels({title: {name: [rows] for name, rows in named_rows.items()}})
