"""The look of all figures, and how they are written: inline in a page, or to a file.

Figures are made without pyplot, and so without a display or global state. matplotlib takes a second
to import, so only functions import it.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe, Ito (2008): told apart under every common colour blindness. The others are for text, rules
# and ground.
BLUE = "#0072b2"
VERMILLION = "#d55e00"
INK = "#1f2328"
FAINT = "#8c959f"
PAPER = "#ffffff"
# In a page each colour is a CSS variable, so that light and dark are the page's choice.
_VARIABLES = {BLUE: "blue", VERMILLION: "vermillion", INK: "ink", FAINT: "faint", PAPER: "paper"}
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture everywhere
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
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


@contextmanager
def styled_figure(width: float, height: float, wspace: float = 0.02) -> Iterator[Figure]:
    """An empty figure of so many inches, to be drawn in the style that holds meanwhile."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(wspace=wspace)
        yield Figure(figsize=(width, height), layout=layout)


def inline_svg(figure: Figure, label: str) -> str:
    """A figure as an `<svg>` element for `page.html`, which defines its colours; text stays text.

    The same figure gives the same markup, without the namespaces, metadata and ids of groups that
    an HTML page does not need or would repeat. A screen reader says the label.
    """
    import matplotlib

    salt = f"f{zlib.crc32(label.encode())}"
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    svg = buffer.getvalue()
    # matplotlib names clip paths after memory addresses, which differ from run to run.
    for i, name in enumerate(re.findall(r'clipPath id="(\w+)"', svg)):
        svg = svg.replace(name, f"{salt}-{i}")
    svg = svg[svg.index("<svg") :].strip()
    unneeded = r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>|(?<=<g) id=\"[^\"]*\""
    opening, rest = re.sub(unneeded, "", svg, flags=re.DOTALL).split(">", 1)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", opening) + ">" + rest
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Writes a figure on white, as the path's ending says, and returns the path; makes folders."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200, facecolor=PAPER)
    return path
