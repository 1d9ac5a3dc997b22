"""Renders the tables of docs/performance.md from the benchmarks' records.

On the page a table stands between `<!-- figures: PATTERN -->` and `<!-- end -->`; the pattern is a
regular expression that is matched with "BENCHMARK: CASE". Of each case on each machine the newest
run is shown.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from studies.page_command import RenderedPage

ROOT = Path(__file__).parents[1]
TABLE = re.compile(r"(<!-- figures: (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
PRECISION = re.compile(r"(.*), (fp32|bf16)$")
COLUMNS = {"": "ratio", "fp32": "float32", "bf16": "bfloat16"}
Record = Mapping[str, Any]


class Figure(NamedTuple):
    """A cell of a table: what was measured, where, in which precision, and what came out."""

    benchmark: str
    case: str
    model: str
    machine: str
    precision: str
    run: str
    text: str


def read(folder: Path) -> list[Record]:
    """All records under the folder, the oldest first; those without a date come before them."""
    records = []
    for path in sorted(folder.glob("*.jsonl")):
        lines = path.read_text(encoding="utf-8").splitlines()
        records += [json.loads(line) for line in lines if line.strip()]
    return sorted(records, key=lambda record: record["environment"].get("date", ""))


def text_of(case: Record) -> str:
    """A ratio, its interval where there is one, and what was divided."""
    ratio = case["ratio"]
    interval = f" [{ratio['low']:.3f}, {ratio['high']:.3f}]" if ratio["count"] > 1 else ""
    amounts = [f"{name} {value:.4g}" for name, value in case["amounts"].items()]
    return f"**{ratio['median']:.3f}**{interval}, {', '.join(amounts[:2])} {case['unit']}"


def figure_of(record: Record, case: Record) -> Figure:
    """A case; its name begins with the benchmark's title where that is a ratio."""
    ratio, colon, model = record["title"].partition(": ")
    model = model if colon else ratio.partition(",")[0]
    if record["options"].get("dtype") == "bfloat16":
        model = model.replace(";", ", bfloat16 weights;")
    name = case["name"].partition(";")[0]
    precise = PRECISION.match(name)
    name, precision = precise.groups() if precise else (name, "")
    where = record["environment"]
    run = [f"threads {where['threads']}", where["revision"], where.get("date", "")[:10]]
    return Figure(
        benchmark=record["benchmark"],
        case=f"{ratio}: {name}" if " / " in ratio else name,
        model=model.partition(";")[0],
        machine=where["device"],
        precision=precision,
        run=", ".join(filter(None, run)),
        text=text_of(case),
    )


def newest(records: Iterable[Record]) -> list[Figure]:
    """The figures of all records, of which a later one replaces an earlier one of the same."""
    found = {}
    for record in records:
        for case in record["cases"]:
            figure = figure_of(record, case)
            found[figure[:5]] = figure
    return list(found.values())


def table(pattern: str, figures: Iterable[Figure]) -> str:
    """A Markdown table of the figures that match, a column for each precision.

    Raises:
        ValueError: if there are none.
    """
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for one in figures:
        if re.match(pattern, f"{one.benchmark}: {one.case}"):
            key = (one.case, one.model, f"{one.machine}, {one.run}")
            lines.setdefault(key, {})[one.precision] = one.text
    if not lines:
        raise ValueError(f"no record of {pattern!r}: expected a case with this name; mend the page")
    given = set().union(*lines.values())
    columns = [name for name in COLUMNS if name in given]
    head = ["case", "model and batch", *(COLUMNS[name] for name in columns), "machine and run"]
    rows = [head, ["---"] * len(head)]
    for (case, model, run), line in lines.items():
        rows.append([case, model, *(line.get(name, "") for name in columns), run])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def rendered(text: str, records: Iterable[Record]) -> str:
    """The page with its tables made anew."""
    figures = newest(records)
    return TABLE.sub(lambda found: found[1] + table(found[2], figures) + found[3], text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Renders the page, or checks it."""
    results = ROOT / "results/benchmarks"
    page = ROOT / "docs/performance.md"

    def anew(text: str, folder: Path) -> str:
        return rendered(text, read(folder))

    RenderedPage("performance_page", __doc__, results, page, anew).run(arguments)


if __name__ == "__main__":
    main()
