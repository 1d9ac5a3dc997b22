"""`bayestune table`: from the records of a results folder, and nothing else."""

from pathlib import Path

from bayestune.benchmark.cells import PLAN, collect
from bayestune.evaluation import read_records
from bayestune.report import Style, grid_tables, has_shift, render, write_shift


def run_table(
    results: Path,
    style: Style = "text",
    output: Path | None = None,
    *,
    resamples: int = 1000,
    against: str | None = None,
) -> str:
    """The table of what is finished so far, printed or written to a file.

    Where a method that was trained on OpenBookQA was also evaluated on other tasks, `shift.md` and
    `risk_coverage.png` are written into the folder as well.

    Args:
        results: a folder of `bench`, also while it runs, or of `compare`.
        style: "text", "markdown", "html" or "latex".
        output: a file; None for standard output.
        resamples: of the paired bootstrap; 0 for no p-values.
        against: the method to compare with, as "BLoB N=10"; None for that of least mean NLL.

    Returns:
        The table.

    Raises:
        FileNotFoundError: if the folder has no records.
    """
    records = collect(results) if (results / PLAN).is_file() else read_records(results)
    if not records:
        raise FileNotFoundError(f"no records in {results}: expected a folder of `bench` or `compare`; run one first")
    if has_shift(records):
        write_shift(records, results)
    table = render(grid_tables(records, results, resamples, against), style)
    if output is None:
        print(table)  # noqa: T201
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(table + "\n", encoding="utf-8")
    return table
