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
NOTE = Path(__file__).parent / "calibration_page.md"
GREEN, ORANGE = "#009e73", "#e69f00"  # of the same palette as the report's
KINDS = {  # of line, marker, colour and name
    "exact": ("o", INK, "exact draws"),
    "prefix": ("s", BLUE, "shared prefix"),
    "blocks": ("^", GREEN, "last blocks only"),
    "mean": ("D", VERMILLION, "mean"),
}


def append(record: Record, file: Path) -> list[dict[str, Any]]:
    """The file's records with this one in place of its task's older one."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    records = [json.loads(line) for line in lines]
    others = [one for one in records if (one["task"], one["model"]) != (record["task"], record["model"])]
    records = [*others, dict(record)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(one, allow_nan=False) + "\n" for one in records), encoding="utf-8")
    return records


def _row(line: Record) -> str:
    cost = "" if line["cost"] is None else f"{line['cost']:.2f}"
    tempered = line["tempered"]
    cells = [
        line["name"],
        cost,
        f"{line['nll']:.3f}",
        f"{100 * line['share']:.0f} [{100 * line['share_low']:.0f}, {100 * line['share_high']:.0f}]",
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
    shown = ("device", "threads", "load", "dtype", "precision", "batch", "tokens", "revision")
    said = " · ".join(f"{name} {where[name]}" for name in shown if where.get(name))
    heads = ("setting", "cost", "NLL", "gain kept, %", "ECE %", "ACC %", "T", "NLL at T", "ECE % at T")
    lines = sorted(record["lines"], key=lambda line: (list(KINDS).index(line["kind"]), line["cost"] or 0))
    return "\n".join(
        [
            f"## {record['task']}, {record['model']}",
            "",
            f"{record['n']} evaluation rows; factor and T chosen on {record['held_out']} held-out rows; "
            f"{record['draws']} draws.",
            f"Cost measured on: {said}." if said else "Cost was not measured.",
            "",
            f"| {' | '.join(heads)} |",
            f"|---|{'---:|' * (len(heads) - 1)}",
            *map(_row, lines),
            "",
        ]
    )


def _panel(axes: Axes, record: Record, metric: str) -> None:
    for kind, (marker, colour, label) in KINDS.items():
        lines = [line for line in record["lines"] if line["kind"] == kind and line["cost"] and line["factor"] == 1]
        lines.sort(key=lambda line: line["cost"])
        axes.plot(
            [line["cost"] for line in lines],
            [line[metric] for line in lines],
            marker=marker,
            color=colour,
            linewidth=0.9,
            markersize=4.5,
            label=label,
        )
    scaled = [line for line in record["lines"] if line["cost"] and line["factor"] != 1]
    axes.scatter(
        [line["cost"] for line in scaled],
        [line[metric] for line in scaled],
        marker="x",
        color=ORANGE,
        zorder=3,
        label="with a factor on Ω",
    )
    mean = next(line for line in record["lines"] if line["kind"] == "mean")
    axes.axhline(mean["tempered"][metric], color=VERMILLION, linewidth=0.9, linestyle=":", label="mean, temperature")
    axes.set_xscale("log")
    axes.set_xticks([1, 2, 3, 5, 10], ["1", "2", "3", "5", "10"])
    axes.minorticks_off()
    axes.grid(color=FAINT, alpha=0.25, linewidth=0.5)


def figure_of(records: Sequence[Record]) -> Figure:
    """NLL and ECE against cost, a column a task."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.4 * len(records), 5.2), layout="constrained")
        panels = figure.subplots(2, len(records), squeeze=False, sharex=True)
        for column, record in enumerate(records):
            for row, (metric, title) in enumerate((("nll", "NLL, nats"), ("ece", "ECE"))):
                _panel(panels[row][column], record, metric)
                if column == 0:
                    panels[row][0].set_ylabel(title)
            panels[0][column].set_title(record["task"])
            panels[1][column].set_xlabel("cost, passes of the mean")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def render(record: Record, file: Path | None, page: Path | None, picture: Path | None) -> None:
    """Keeps the record, prints its table, and writes page and picture of all records of the file."""
    print(section(record))
    if file is None:
        return
    records = append(record, file)
    if page is not None:
        note = NOTE.read_text(encoding="utf-8").strip() if NOTE.is_file() else "# Calibration against cost"
        text = "\n\n".join([note, *(section(one).strip() for one in records)])
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(text + "\n", encoding="utf-8")
    if picture is not None:
        costed = [one for one in records if any(line["cost"] for line in one["lines"])]
        save_figure(figure_of(costed or records), picture)
