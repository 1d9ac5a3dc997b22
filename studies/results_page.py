"""The tables of docs/results.md, from the records of the evidence.

`python -m studies.results_page` writes the page anew, `--check` fails while it is stale. The words
between the tables are written by hand.
"""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import fmean

from bayestune.bench import finished
from bayestune.metrics import LEVEL, holm
from bayestune.report import Table, grid_tables, render, significance
from bayestune.report.comparable import by_seed
from bayestune.report.rows import Record
from bayestune.report.table import Block, Cell
from studies.page_command import RenderedPage

ROOT = Path(__file__).parents[1]
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
AGAINST = "BLoB N=10"
STUDENT = "Distilled"
RIVALS = ("MLE", "MAP", "MCDropout N=10", "Ensemble", "BBB N=10")  # of the paper's promise
NAMES = {STUDENT: "Student of BLoB", "Temperature": "MLE + temperature"}
FIGURES = ("ACC % ↑", "ECE % ↓", "ECE if calibrated %", "NLL ↓", "Brier ↓")
GATES = ("wrong ≥ 0.9 ↓", "risk@80 % cov ↓", "AURC ↓")
CHANCE = "log C"
NEAR = 0.01  # nats that a student may be worse than its teacher
POINTS = 0.015  # of accuracy that BLoB may lose to MLE


def alone(block: Block, columns: Sequence[str]) -> str:
    """A block as a table of its own, under readable names."""
    lines = tuple((NAMES.get(name, name), cells) for name, cells in block.lines)
    table = Table("", tuple(columns), (Block("", lines),), heads=(block.title,))
    return render([table], "markdown").strip()


def blocks_of(table: Table, titles: Sequence[str]) -> str:
    """Some blocks of a table, each as one of its own; log C is a line of the NLL's."""
    known = {block.title: block for block in table.blocks}
    guess = known.get(CHANCE)
    found = []
    for title in titles:
        block = known[title]
        if title == "NLL ↓" and guess is not None:
            block = Block(title, (*block.lines, *guess.lines))
        found.append(alone(block, table.columns))
    return "\n\n".join(found)


def mean_of(records: Sequence[Record], label: str, metric: str) -> float | None:
    """A metric's mean over the seeds of a method; None without a record."""
    runs = by_seed(records).get(label, {})
    values = [record["metrics"][metric]["value"] for record in runs.values()]
    return fmean(values) if values else None


def verdict_on(records: Sequence[Record], folder: Path) -> tuple[str, ...]:
    """A set's line: BLoB against each rival and chance, its accuracy, and the student."""
    ours = mean_of(records, AGAINST, "nll")
    found = significance(records, folder, AGAINST)
    p_values = holm({name: paired["nll"].p_value for name, paired in found.items()})
    cells = []
    for rival in RIVALS:
        if rival not in found:
            cells.append("–")
        elif p_values[rival] >= 1 - LEVEL:
            cells.append("tie")
        else:
            cells.append("lower" if found[rival]["nll"].difference > 0 else "higher")
    accuracy = mean_of(records, AGAINST, "accuracy")
    mle = mean_of(records, "MLE", "accuracy")
    near = None if accuracy is None or mle is None else accuracy >= mle - POINTS
    student = mean_of(records, STUDENT, "nll")
    kept = None if student is None or ours is None else student <= ours + NEAR
    words = {None: "–", True: "yes", False: "no"}
    return (*cells, words[near], words[kept])


def promises(records: Sequence[Record], folder: Path) -> str:
    """What was promised before the runs, set by set."""
    tasks: dict[str, list[Record]] = {}
    for record in records:
        tasks.setdefault(record["task"], []).append(record)
    heads = tuple(f"NLL against {NAMES.get(rival, rival)}" for rival in RIVALS)
    heads += ("accuracy within 1.5 points of MLE's", "student at most 0.01 above ten draws")
    lines = []
    for task, some in tasks.items():
        cells = tuple(map(Cell, verdict_on(some, folder)))
        lines.append((f"{task}, {_seeds(some)}", cells))
    table = Table("", heads, (Block("", tuple(lines)),), heads=(AGAINST,))
    return render([table], "markdown").strip()


def _seeds(records: Sequence[Record]) -> str:
    seeds = sorted({record["seed"] for record in records})
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def rendered(text: str, folder: Path) -> str:
    """The page with its tables made anew; those that it does not have are not made."""
    records = finished(folder)

    @cache
    def table() -> Table:
        (found,) = grid_tables(records, folder, against=AGAINST)
        return found

    differences = [f"{title} less {AGAINST}'s" for title in ("NLL", "Brier", "ACC %")]
    makers = {
        "figures": lambda: blocks_of(table(), FIGURES),
        "gate": lambda: blocks_of(table(), GATES),
        "differences": lambda: blocks_of(table(), differences),
        "promises": lambda: promises(records, folder),
    }
    return TABLE.sub(lambda found: f"{found[1]}{makers[found[2]]()}\n{found[3]}", text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Renders the page, or checks it."""
    results = ROOT / "results/evidence/grid"
    RenderedPage("results_page", __doc__, results, ROOT / "docs/results.md", rendered).run(
        arguments
    )


if __name__ == "__main__":
    main()
