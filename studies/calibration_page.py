"""Records of calibration against cost → a page with a table for each task, and one picture."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bayestune.report import BLUE, FAINT, INK, STYLE, VERMILLION, save_figure

Record = Mapping[str, Any]
NOTE = Path(__file__).with_suffix(".md")
GREEN = "#009e73"  # of the same palette as the report's
ORANGE = "#e69f00"
KINDS = {  # marker, colour and name of a line
    "exact": ("o", INK, "exact draws"),
    "prefix": ("s", BLUE, "shared prefix"),
    "blocks": ("^", GREEN, "last blocks only"),
    "mean": ("D", VERMILLION, "mean"),
}
FACTS = ("device", "threads", "load", "dtype", "precision", "batch", "tokens", "revision")
HEADS = (
    "setting",
    "cost",
    "NLL",
    "gain kept, %",
    "ECE %",
    "ACC %",
    "T",
    "NLL at T",
    "ECE % at T",
)


def read(file: Path) -> list[dict[str, Any]]:
    """The records of a file, none if there is no file."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines]


def append(record: Record, file: Path) -> list[dict[str, Any]]:
    """The file's records with this one in place of its task's older one."""
    own = (record["task"], record["model"])
    records = [one for one in read(file) if (one["task"], one["model"]) != own]
    records.append(dict(record))
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(one, allow_nan=False) + "\n" for one in records]
    file.write_text("".join(lines), encoding="utf-8")
    return records


def _row(line: Record) -> str:
    share, low, high = (100 * line[name] for name in ("share", "share_low", "share_high"))
    tempered = line["tempered"]
    cells = [
        line["name"],
        "" if line["cost"] is None else f"{line['cost']:.2f}",
        f"{line['nll']:.3f}",
        f"{share:.0f} [{low:.0f}, {high:.0f}]",
        f"{100 * line['ece']:.1f}",
        f"{100 * line['accuracy']:.1f}",
        f"{tempered['temperature']:.2f}",
        f"{tempered['nll']:.3f}",
        f"{100 * tempered['ece']:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def section(record: Record) -> str:
    """One task's table."""
    where = record["cost_measured_on"]
    said = " · ".join(f"{name} {where[name]}" for name in FACTS if where.get(name))
    kinds = list(KINDS)
    lines = sorted(record["lines"], key=lambda line: (kinds.index(line["kind"]), line["cost"] or 0))
    chosen = f"factor and T chosen on {record['held_out']} held-out rows"
    rows = f"{record['n']} evaluation rows; {chosen}"
    parts = [
        f"## {record['task']}, {record['model']}",
        "",
        f"{rows}; {record['draws']} draws.",
        f"Cost measured on: {said}." if said else "Cost was not measured.",
        "",
        f"| {' | '.join(HEADS)} |",
        f"|---|{'---:|' * (len(HEADS) - 1)}",
        *map(_row, lines),
    ]
    return "\n".join(parts)


def page(records: Sequence[Record]) -> str:
    """The note, and a section for each record."""
    note = NOTE.read_text(encoding="utf-8").strip()
    return "\n\n".join([note, *map(section, records)]) + "\n"


def _points(lines: Sequence[Record], metric: str) -> tuple[list[float], list[float]]:
    ordered = sorted(lines, key=lambda line: line["cost"])
    return [line["cost"] for line in ordered], [line[metric] for line in ordered]


def _panel(axes: Axes, record: Record, metric: str) -> None:
    measured = [line for line in record["lines"] if line["cost"]]
    plain = [line for line in measured if line["factor"] == 1]
    for kind, (marker, colour, label) in KINDS.items():
        points = _points([line for line in plain if line["kind"] == kind], metric)
        axes.plot(*points, marker=marker, color=colour, linewidth=0.9, markersize=4.5, label=label)
    scaled = _points([line for line in measured if line["factor"] != 1], metric)
    axes.scatter(*scaled, marker="x", color=ORANGE, zorder=3, label="with a factor on Ω")
    mean = next(line for line in record["lines"] if line["kind"] == "mean")
    style = {"color": VERMILLION, "linewidth": 0.9, "linestyle": ":"}
    axes.axhline(mean["tempered"][metric], label="mean, temperature", **style)
    axes.set_xscale("log")
    axes.set_xticks([1, 2, 3, 5, 10], ["1", "2", "3", "5", "10"])
    axes.minorticks_off()
    axes.grid(color=FAINT, alpha=0.25, linewidth=0.5)


def figure_of(records: Sequence[Record]) -> Figure:
    """NLL and ECE against cost, a column a task."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.4 * len(records), 5.2), layout="constrained")
        panels = figure.subplots(2, len(records), squeeze=False, sharex=True)
        panels[0][0].set_ylabel("NLL, nats")
        panels[1][0].set_ylabel("ECE")
        for column, record in enumerate(records):
            upper, lower = panels[:, column]
            _panel(upper, record, "nll")
            _panel(lower, record, "ece")
            upper.set_title(record["task"])
            lower.set_xlabel("cost, passes of the mean")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def render(record: Record, file: Path | None, shown: Path | None, picture: Path | None) -> None:
    """Keeps the record, prints its table, and writes page and picture of all records."""
    print(section(record))
    if file is None:
        return
    records = append(record, file)
    if shown is not None:
        shown.parent.mkdir(parents=True, exist_ok=True)
        shown.write_text(page(records), encoding="utf-8")
    if picture is not None:
        costed = [one for one in records if one["cost_measured_on"]]
        save_figure(figure_of(costed or records), picture)
