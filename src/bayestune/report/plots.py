"""Records → figures, without pyplot and so without a display or global state. The only module that needs matplotlib."""

import io
import math
import re
import textwrap
import zlib
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from bayestune.metrics import Reliability
from bayestune.report.table import COLUMNS, Column, Record, grouped, heading, names

# Okabe, Ito (2008): told apart under every common colour blindness. The others are for text, rules and ground.
BLUE, VERMILLION, INK, FAINT, PAPER = "#0072b2", "#d55e00", "#1f2328", "#8c959f", "#ffffff"
# In a page each colour is a CSS variable, so that light and dark are the page's choice.
VARIABLES = {BLUE: "blue", VERMILLION: "vermillion", INK: "ink", FAINT: "faint", PAPER: "paper"}
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture everywhere
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "hatch.linewidth": 0.8,
    "legend.frameon": False,
}
_PER_ROW = 4
_OVER = {"facecolor": "none", "edgecolor": VERMILLION, "linewidth": 0.8, "hatch": "////"}
_UNDER = {"facecolor": "none", "edgecolor": BLUE, "linewidth": 0.8, "hatch": "...."}


def _draw_diagram(axes: Axes, diagram: Reliability) -> None:
    """Accuracy and mean confidence per bin: solid up to the lesser, hatched from there to the other."""
    width = 1 / len(diagram.counts)
    used = (diagram.counts > 0).numpy()
    left = np.arange(len(used))[used] * width
    accuracy, confidence = diagram.accuracy.numpy()[used], diagram.confidence.numpy()[used]
    lesser, gap = np.minimum(accuracy, confidence), confidence - accuracy
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)), zorder=3)
    axes.bar(left, lesser, width, align="edge", color=BLUE, edgecolor=PAPER, linewidth=0.6)
    for where, kind in ((gap > 0, _OVER), (gap < 0, _UNDER)):
        axes.bar(left[where], np.abs(gap)[where], width, lesser[where], align="edge", **kind)
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
    axes.set_xticklabels([])


def _draw_histogram(axes: Axes, diagram: Reliability) -> None:
    """Share of rows per bin; the overall accuracy and mean confidence as lines."""
    bins, rows = len(diagram.counts), int(diagram.counts.sum())
    share = diagram.counts.numpy() / rows
    axes.bar(
        np.arange(bins) / bins,
        share,
        1 / bins,
        align="edge",
        color=FAINT,
        edgecolor=PAPER,
        linewidth=0.6,
    )
    means = ((diagram.accuracy, BLUE, "-"), (diagram.confidence, VERMILLION, (0, (3, 2))))
    for values, colour, dash in means:
        mean = float((values.nan_to_num() * diagram.counts).sum()) / rows
        axes.axvline(mean, color=colour, linewidth=1.4, linestyle=dash)
    axes.set(xlim=(0, 1), xticks=[0, 0.5, 1], xlabel="confidence")
    axes.set_xticklabels(["0", "0.5", "1"])
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_locator(MaxNLocator(2))


def reliability_figure(
    titles: Sequence[str], diagrams: Sequence[Reliability], captions: Sequence[str] | None = None
) -> Figure:
    """One panel per method: accuracy against confidence above, where the confidences lie below.

    The lines in the histogram are the mean accuracy (solid) and the mean confidence (dashed).

    Args:
        titles: a name per panel.
        diagrams: what `bayestune.metrics.reliability` gives, one per panel.
        captions: a line under each title, such as the ECE.

    Returns:
        A figure, four panels a row.

    Raises:
        ValueError: if there are no panels, or not as many titles, captions and diagrams.

    Reference: DeGroot, Fienberg (1983), https://doi.org/10.2307/2987588
    """
    captions = [""] * len(titles) if captions is None else captions
    if not titles or not len(titles) == len(diagrams) == len(captions):
        got = f"{len(titles)} titles, {len(diagrams)} diagrams, {len(captions)} captions"
        raise ValueError(
            f"got {got}; expected one of each for every panel, and a panel at least; match their lengths"
        )
    columns = min(len(titles), _PER_ROW)
    bands = math.ceil(len(titles) / columns)
    with matplotlib.rc_context(STYLE):
        legend = 0.35 if columns > 2 else 0.8  # inches
        figure = Figure(figsize=(2.35 * columns + 0.5, 3.85 * bands + legend), layout="constrained")
        grid = figure.add_gridspec(2 * bands, columns, height_ratios=[3.2, 1] * bands)
        for i, (title, diagram, caption) in enumerate(zip(titles, diagrams, captions, strict=True)):
            band, column = divmod(i, columns)
            upper, lower = (figure.add_subplot(grid[2 * band + k, column]) for k in (0, 1))
            _draw_diagram(upper, diagram)
            _draw_histogram(lower, diagram)
            _title(upper, title, caption)
            upper.set_ylabel("accuracy" if column == 0 else "")
            lower.set_ylabel("rows" if column == 0 else "")
        _share_height(figure.axes[1::2])
        figure.legend(
            handles=_legend(), loc="outside lower left", ncols=min(4, columns), handlelength=1.6
        )
    return figure


def _legend() -> list[Artist]:
    return [
        Patch(facecolor=BLUE, label="accuracy"),
        Patch(**_OVER, label="confidence above accuracy"),
        Patch(**_UNDER, label="accuracy above confidence"),
        Line2D([], [], color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)), label="calibrated"),
    ]


def _title(axes: Axes, title: str, caption: str) -> None:
    lines = textwrap.wrap(title, 26)
    axes.set_title("\n".join(lines), loc="left", pad=18 if caption else 6)
    if caption:
        axes.annotate(
            caption,
            (0, 1),
            (0, 6),
            xycoords="axes fraction",
            textcoords="offset points",
            fontsize=8,
        )


def _share_height(panels: Sequence[Axes]) -> None:
    top = max(axes.get_ylim()[1] for axes in panels)
    for axes in panels:
        axes.set_ylim(0, top)


def _draw_intervals(axes: Axes, column: Column, records: Sequence[Record]) -> None:
    """A point and its interval per record, top to bottom, and a thin line at the first to read the others against."""
    for y, record in enumerate(records):
        metric = record.get("metrics", {}).get(column.key)
        if not metric:
            continue
        value, low, high = (metric[key] * column.scale for key in ("value", "low", "high"))
        colour = INK if y == 0 and len(records) > 1 else BLUE
        axes.plot([low, high], [y, y], color=colour, linewidth=1.6, solid_capstyle="butt")
        axes.plot([value], [y], marker="o", markersize=5, color=colour, linestyle="none")
        number = axes.annotate(
            column.number(metric["value"]),
            (value, y),
            (0, 6),
            textcoords="offset points",
            ha="center",
        )
        number.set_bbox({"facecolor": PAPER, "edgecolor": "none", "pad": 0.6})
        if y == 0 and len(records) > 1:
            axes.axvline(value, color=FAINT, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    axes.set_title(column.title, loc="left")
    axes.set_xlabel("higher is better →" if column.sign > 0 else "← lower is better")
    axes.set(ylim=(len(records) - 0.45, -0.65), yticks=range(len(records)))
    axes.margins(x=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def summary_figure(records: Sequence[Record]) -> Figure:
    """Accuracy, ECE, NLL and Brier score of each record with bootstrap intervals, a panel per metric.

    Args:
        records: one per evaluated method; the first is the one that the others are read against.

    Returns:
        A figure with as many rows as records.

    Raises:
        ValueError: if there are no records.
    """
    same = len(grouped(records)) == 1
    shown = [column for column in COLUMNS if column.key in ("accuracy", "ece", "nll", "brier")]
    with matplotlib.rc_context(STYLE):
        figure = Figure(
            figsize=(9.2, 1.25 + 0.42 * len(records)), layout=ConstrainedLayoutEngine(wspace=0.06)
        )
        panels = figure.subplots(1, len(shown), sharey=True)
        for axes, column in zip(panels, shown, strict=True):
            _draw_intervals(axes, column, records)
        panels[0].set_yticklabels([textwrap.fill(name, 24) for name in names(records)])
        figure.suptitle(
            heading(records[0]) if same else "", x=0.01, ha="left", fontsize=8.5, color=INK
        )
    return figure


def _svg(figure: Figure, salt: str, fonttype: str, **options: Any) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": fonttype, "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, **options)
    svg = buffer.getvalue()
    # matplotlib names clip paths after memory addresses: number them instead, so that a figure is always the same file.
    for i, name in enumerate(re.findall(r'clipPath id="(\w+)"', svg)):
        svg = svg.replace(name, f"{salt}-{i}")
    return svg


def inline_svg(figure: Figure, label: str) -> str:
    """A figure as an `<svg>` element for a page that defines the CSS variables of `VARIABLES`; text stays text.

    Args:
        figure: what the functions here return.
        label: what a screen reader says.

    Returns:
        Markup without namespaces, metadata or ids of groups, which an HTML page does not need or would repeat.
    """
    svg = _svg(figure, f"f{zlib.crc32(label.encode())}", "none", transparent=True)
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(
        r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>|(?<=<g) id=\"[^\"]*\"",
        "",
        svg,
        flags=re.DOTALL,
    )
    opening, rest = svg.split(">", 1)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", opening) + ">" + rest
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure on white; the same figure gives the same bytes.

    Args:
        figure: what the functions here return.
        path: ends in .png (200 dots an inch) or .svg; missing folders are made.

    Returns:
        The path.

    Raises:
        ValueError: on another ending.
    """
    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise ValueError(
            f"got the ending {path.suffix!r}; expected .png or .svg; rename {path.name}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".svg":
        path.write_text(_svg(figure, "bayestune", "path", facecolor=PAPER), encoding="utf-8")
    else:
        figure.savefig(path, dpi=200, facecolor=PAPER)
    return path
