"""Renders docs/performance.md from the lines that the benchmarks wrote; no figure on the page is typed.

The newest run of a benchmark with the same options on the same device is shown, older ones are left out. Words about
the figures are in `performance_notes/`: intro.md and closing.md, and NAME.md for the section of a benchmark.
"""

import copy
import json
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from render_parts import (
    PATHS,
    Record,
    bar_rows,
    command,
    described,
    distinct,
    environment_line,
    measured,
    title_of,
)

FOLDER = Path(__file__).parent
ORDER = ("train_step", "memory", "task_step", "text_step", "draws", "gpu", "laplace", "import_time")
OWN_PAGE = ("calibration_cost",)  # only its note is on this page
EFFORT = {"repeats", "warmup", "seconds"}  # how long was measured, not what
CHOICES = {"precisions", "noise", "control"}  # which lines of a table were measured
AROUND = ("intro", "closing")


def read(folder: Path) -> list[Record]:
    """All records under the folder, the oldest first; those without a date come before the others."""
    lines = [
        line
        for path in sorted(folder.glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    records = [
        {"environment": {}, "options": {}, **json.loads(line)} for line in lines if line.strip()
    ]
    return sorted(records, key=lambda record: record["environment"].get("date", ""))


def machine_of(record: Record) -> str:
    """The processor or the GPU that a run was made on."""
    return record["environment"].get("device", "")


def subject(record: Record) -> tuple[str, ...]:
    """What was measured and where: equal for two runs of which only the newer one counts."""
    options = {
        name: value for name, value in distinct(record).items() if name not in EFFORT | CHOICES
    }
    named = {name: Path(value).name if name in PATHS else value for name, value in options.items()}
    return record["benchmark"], machine_of(record), json.dumps(named, sort_keys=True)


def replaces(newer: Record, older: Record) -> bool:
    """Whether a later run has measured all that an earlier one has."""
    if subject(newer) != subject(older):
        return False
    pairs = [(newer["options"].get(name), older["options"].get(name)) for name in CHOICES]
    return all(
        set(new) >= set(old)
        for new, old in pairs
        if isinstance(new, list) and isinstance(old, list)
    )


def newest(records: Sequence[Record]) -> list[Record]:
    """The records that no later one replaces."""
    return [
        one
        for i, one in enumerate(records)
        if not any(replaces(later, one) for later in records[i + 1 :])
    ]


def merged(records: Sequence[Record]) -> list[Record]:
    """The lines that one command wrote section by section (`gpu.py`) as one record."""
    found: dict[str, Record] = {}
    for record in records:
        options = {name: value for name, value in record["options"].items() if name != "sections"}
        key = json.dumps(
            [record["benchmark"], record.get("title"), record["environment"], options],
            sort_keys=True,
        )
        if key in found:
            found[key]["options"]["sections"] += record["options"]["sections"]
            found[key]["cases"] += record["cases"]
        else:
            found[key] = copy.deepcopy(record)
    return list(found.values())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def summary(records: Sequence[Record]) -> str:
    """One line for each bar."""
    rows = [
        [f"[{record['benchmark']}](#{record['benchmark']})", *row, machine_of(record)]
        for record in records
        for row in bar_rows(record)
    ]
    head = ["benchmark", "what", "measured", "95 % interval", "bar", "", "machine"]
    return table(head, rows) if rows else "Nothing with a bar has been measured yet."


def entry(record: Record) -> str:
    """A run: its title, its command, where it ran, and its table."""
    head, rows = measured(record)
    parts = [
        f"### {title_of(record)}",
        f"```sh\n{command(record)}\n```",
        environment_line(record),
        table(head, rows),
    ]
    return "\n\n".join(parts)


def section(name: str, records: Sequence[Record], notes: Mapping[str, str]) -> str:
    """A benchmark: what it measures, what was written about it, and its runs."""
    own = [record for record in records if record["benchmark"] == name]
    parts = [f"## {name}", described(name), notes.get(name, ""), *map(entry, own)]
    return "\n\n".join(part for part in parts if part)


def page(records: Sequence[Record], notes: Mapping[str, str]) -> str:
    """The whole page."""
    shown = merged(newest([record for record in records if record["benchmark"] not in OWN_PAGE]))
    names = {record["benchmark"] for record in shown} | (set(notes) - set(AROUND))
    ordered = sorted(
        names, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name)
    )
    shown.sort(key=lambda record: ordered.index(record["benchmark"]))
    parts = ["# Performance", notes.get("intro", ""), "## Bars", summary(shown)]
    parts += [*(section(name, shown, notes) for name in ordered), notes.get("closing", "")]
    return "\n\n".join(part for part in parts if part) + "\n"


def options_of(arguments: Sequence[str] | None) -> Namespace:
    """The command's options."""
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    root = FOLDER.parent
    parser.add_argument(
        "--results", type=Path, default=root / "results/benchmarks", help="folder of JSON lines"
    )
    parser.add_argument(
        "--notes", type=Path, default=FOLDER / "performance_notes", help="folder of the words"
    )
    parser.add_argument(
        "--output", type=Path, default=root / "docs/performance.md", help="the page"
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if the page is stale"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the page, or checks it."""
    options = options_of(arguments)
    notes = {
        path.stem: path.read_text(encoding="utf-8").strip()
        for path in sorted(options.notes.glob("*.md"))
    }
    text = page(read(options.results), notes)
    if not options.check:
        options.output.write_text(text, encoding="utf-8")
    elif not options.output.is_file() or options.output.read_text(encoding="utf-8") != text:
        sys.exit(f"{options.output} is stale: run python benchmarks/render.py")


if __name__ == "__main__":
    main()
