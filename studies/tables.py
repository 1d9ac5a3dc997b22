"""Writes the tables and pictures of `results/`, and README's table, anew from the kept rows.

`python -m studies.tables` after a change of a metric or an interval; records stay as they were
written.
"""

import re
from pathlib import Path

from bayestune.bench import collect
from bayestune.evaluation import read_records
from bayestune.report import (
    evaluation_tables,
    grid_tables,
    render,
    renewed,
    save_figure,
    summary_figure,
)

ROOT = Path(__file__).parents[1]
COMPARED = ("demo", "arc_easy")
AGAINST = "BLoB N=10"


def summary(name: str) -> str:
    """The tables of a folder that `compare` wrote, as markdown."""
    folder = ROOT / "results" / name
    return render(evaluation_tables(renewed(read_records(folder), folder)), "markdown")


def table_alone(text: str) -> str:
    """The lines of the first markdown table, without caption and notes."""
    table = re.search(r"^\|.*?(?=\n\n)", text, flags=re.DOTALL | re.MULTILINE)
    assert table is not None
    return table.group()


def in_readme(text: str) -> str:
    """README with the demo's table in the place of the one it has."""
    new = table_alone(summary("demo"))
    return re.sub(r"\| Method \| ACC.*?(?=\n\n)", lambda _: new, text, flags=re.DOTALL)


def main() -> None:
    """Writes all of them."""
    for name in COMPARED:
        folder = ROOT / "results" / name
        (folder / "table.md").write_text(summary(name) + "\n", encoding="utf-8")
        figure = summary_figure(renewed(read_records(folder), folder))
        save_figure(figure, folder / "summary.png")
        if name == "demo":
            save_figure(figure, ROOT / "docs/images/demo.png")
    readme = ROOT / "README.md"
    readme.write_text(in_readme(readme.read_text(encoding="utf-8")), encoding="utf-8")
    grid = ROOT / "results/grid"
    records = collect(grid)
    text = render(grid_tables(records, grid, against=AGAINST), "markdown")
    (grid / "table.md").write_text(text + "\n", encoding="utf-8")
    text = render(grid_tables(records, grid), "latex")
    (grid / "table.tex").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
