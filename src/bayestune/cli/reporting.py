"""`report`: records of any results folders as one page."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from jsonargparse import Namespace

from bayestune.bench import PLAN, finished
from bayestune.errors import Refusal
from bayestune.evaluation import RECORDS, Record, read_records
from bayestune.report import (
    Origin,
    evaluation_tables,
    render,
    renewed,
    save_figure,
    summary_figure,
    write_page,
)
from bayestune.runtime import revision, versions
from bayestune.whole_files import read_json_lines


def report(o: Namespace) -> None:
    """One HTML page of any number of runs: figures, charts, rows; it loads nothing."""
    if o.to.suffix.lower() not in (".html", ".htm") or o.to.is_dir():
        raise Refusal(f"--to {o.to} is no page: expected a file that ends in .html; name one")
    results: dict[Path, list[Record]] = {}
    for path in o.results:
        for folder, records in results_of(path):
            results.setdefault(folder, []).extend(records)
    records = [record for some in results.values() for record in some]
    title = o.title or title_of(records)
    print(f"report: {write_page(results, o.to, title, origin_of(o.command_line))}")


def origin_of(command_line: str) -> Origin:
    """This revision and its versions, which a command line asked."""
    return Origin(command_line, revision(), versions())


def write_report(folder: Path, command: str = "") -> None:
    """Table, picture and page of a results folder, from its records alone."""
    records = renewed(read_records(folder), folder)
    tables = evaluation_tables(records)
    table = render(tables, "markdown")
    (folder / "table.md").write_text(f"{table}\n", encoding="utf-8")
    save_figure(summary_figure(records), folder / "summary.png")
    title = f"{records[0]['task']}, {records[0]['model']}"
    page = write_page({folder: records}, folder / "report.html", title, origin_of(command))
    print(render(tables))
    print(f"report: {page}")


def title_of(records: Sequence[Record]) -> str:
    """The tasks and models of records."""
    parts = []
    for key in ("task", "model"):
        names = dict.fromkeys(str(record[key]) for record in records if key in record)
        parts.append(", ".join(names))
    return "; ".join(parts)


def results_of(path: Path) -> Iterator[tuple[Path, list[Record]]]:
    """Records of a results folder, of each results folder in a folder, or of a file of them.

    Each comes with the folder that the records' rows are in.

    Raises:
        FileNotFoundError: if there are none.
    """
    if path.is_file():
        records = read_json_lines(path)
        # a file of `cells` names rows from the results folder above it
        above = _names_rows(records, path.parent.parent)
        yield (path.parent.parent if above else path.parent), records
        return
    inner = sorted(path.iterdir()) if path.is_dir() else []
    found = False
    for folder in [path] if _has_records(path) else inner:
        if _has_records(folder):
            found = True
            yield folder, _records_in(folder)
    if not found:
        raise FileNotFoundError(
            f"no records in {path}: expected a folder of `bench`, `compare` or `evaluate`, or a "
            "file of records; run one first"
        )


def _names_rows(records: Sequence[Record], folder: Path) -> bool:
    named = [record["predictions"] for record in records if record.get("predictions")]
    return any((folder / name).is_file() for name in named)


def _has_records(folder: Path) -> bool:
    return (folder / PLAN).is_file() or (folder / RECORDS).is_file()


def _records_in(folder: Path) -> list[Record]:
    return finished(folder) if (folder / PLAN).is_file() else read_records(folder)
