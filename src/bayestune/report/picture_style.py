"""The look of all pictures for pages, and how they are written to a file.

Figures are made without pyplot, and so without a display or global state. matplotlib takes a second
to import, so only functions import it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Writes a figure on white, as the path's ending says, and returns the path; makes folders."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200, facecolor=PAPER)
    return path
