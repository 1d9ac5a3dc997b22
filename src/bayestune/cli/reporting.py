"""`table` and `report`: the records of results folders as a table, and as one page."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from jsonargparse import Namespace

from bayestune.bench import PLAN, collect, finished
from bayestune.errors import Refusal
from bayestune.evaluation import RECORDS, Record, read_records
from bayestune.report import (
    Origin,
    evaluation_tables,
    grid_tables,
    has_shift,
    render,
    renewed,
    save_figure,
    summary_figure,
    write_page,
    write_shift,
)
from bayestune.runtime import revision, versions
from bayestune.whole_files import read_json_lines


def table(args: Namespace) -> None:
    """Writes the table of a results folder: methods × tasks, mean ± std over seeds, significance.

    If a method trained on OpenBookQA was also evaluated on other tasks, it writes `shift.md` and
    `risk_coverage.png` into the folder as well.
    """
    if args.output and args.output.exists() and args.output.name in (RECORDS, PLAN):
        raise Refusal(f"--output {args.output} has the records themselves: choose another file")
    folder = args.results
    records = collect(folder) if (folder / PLAN).is_file() else read_records(folder)
    if not records:
        raise FileNotFoundError(
            f"no records in {folder}: expected a folder of `bench` or `compare`; run one first"
        )
    if has_shift(records):
        write_shift(records, folder)
    text = render(grid_tables(records, folder, args.resamples, args.against), args.style)
    if args.output is None:
        print(text)
    else:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(f"{text}\n", encoding="utf-8")


def report(args: Namespace) -> None:
    """Writes one HTML page of any number of runs: figures, charts, rows; the page loads nothing."""
    if args.to.suffix.lower() not in (".html", ".htm") or args.to.is_dir():
        raise Refusal(f"--to {args.to} is no page: expected a file that ends in .html; name one")
    results: dict[Path, list[Record]] = {}  # by the folder that their rows are in
    all_records: list[Record] = []
    for path in args.results:
        for folder, records in results_of(path):
            results.setdefault(folder, []).extend(records)
            all_records += records
    title = args.title or title_of(all_records)
    print(f"report: {write_page(results, args.to, title, origin_of(args.command_line))}")


def origin_of(command_line: str) -> Origin:
    """What a page says of how it was made: the command line, our revision, the versions."""
    return Origin(command_line, revision(), versions())


def write_report(folder: Path, command: str = "") -> None:
    """Writes table, picture and page of a results folder, from its records alone.

    Args:
        folder: with records.
        command: the command line, for the page.
    """
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
    """A page's title: the tasks and the models of its records, each once."""
    parts = []
    for key in ("task", "model"):
        names = dict.fromkeys(str(record[key]) for record in records if key in record)
        parts.append(", ".join(names))
    return "; ".join(parts)


def results_of(path: Path) -> Iterator[tuple[Path, list[Record]]]:
    """Finds records, and the folders that their rows are in.

    Args:
        path: a results folder, a folder of results folders, or a file of records.

    Returns:
        Pairs of such a folder and records.

    Raises:
        FileNotFoundError: if there are no records.
    """
    if path.is_file():
        records = read_json_lines(path)
        # a file of `cells` names rows from the results folder above it
        above = path.parent.parent
        yield (above if _has_rows_of(records, above) else path.parent), records
        return
    inside = sorted(path.iterdir()) if path.is_dir() else []
    candidates = [path] if _has_records(path) else inside
    folders = [folder for folder in candidates if _has_records(folder)]
    for folder in folders:
        yield folder, _records_in(folder)
    if not folders:
        raise FileNotFoundError(
            f"no records in {path}: expected a folder of `bench`, `compare` or `evaluate`, or a "
            "file of records; run one first"
        )


def _has_rows_of(records: Sequence[Record], folder: Path) -> bool:
    """Whether a folder has one of the files of rows that the records name."""
    names = [record["predictions"] for record in records if record.get("predictions")]
    return any((folder / name).is_file() for name in names)


def _has_records(folder: Path) -> bool:
    """Whether a folder is a results folder: of `bench`, which has a plan, or of another command."""
    return (folder / PLAN).is_file() or (folder / RECORDS).is_file()


def _records_in(folder: Path) -> list[Record]:
    return finished(folder) if (folder / PLAN).is_file() else read_records(folder)
