"""Which rows to label: accuracy and NLL against labels, by rule, on a small model.

    python -m studies.active_labelling run --model MODEL [--data_root DATA] [--task NAME …]
    python -m studies.active_labelling table

A pool of 200 rows; 20 random ones are labelled, then five times 20 that a rule picks; after each
the method is fitted anew. Arms: BLoB with BALD (the k-centre in A x among the rows of largest
mutual information), MLE + temperature with the entropy, and both methods with random rows, without
which a rule cannot be told from a method. T is fitted on 40 further labelled rows, which the
numbers of labels leave out. Run again, it goes on after the last record.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayestune.adapters import Lora, detach
from bayestune.data import Question, Task
from bayestune.decisions import best_temperature, rank_rows, spread_out
from bayestune.methods import MLE, BLoB, Method
from bayestune.metrics import accuracy, nll
from bayestune.runtime import versions
from bayestune.session import Fit, PredictionOptions, Session, TaskOptions, name_in_records
from bayestune.training import Training
from bayestune.whole_files import read_json_lines, write_json_lines

FOLDER = Path(__file__).parents[1] / "results/active_labelling"
POOL = 200
TEMPERATURE_ROWS = 40
STEP = 20  # labels of a round
ROUNDS = 6  # the first one random
TEST_ROWS = 120
DRAWS = 5
TRAINING = Training(
    lora=Lora(targets=("q_proj", "v_proj")), steps=40, learning_rate=1e-3, bf16=True, progress=False
)
METHODS: dict[str, Method] = {
    "blob": BLoB(prior_std=0.4, final_std=0.3, schedule="constant"),  # as in the demo
    "mle": MLE(),
}
# arm: method, rule; an arm with a rule comes first, whose first fit the random one shares
ARMS = {
    "BLoB, BALD": ("blob", "bald"),
    "BLoB, random": ("blob", "random"),
    "MLE + T, entropy": ("mle", "entropy"),
    "MLE + T, random": ("mle", "random"),
}
Record = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """One seed's rows: a pool to label from, and those that T is fitted on."""

    pool: tuple[Question, ...]
    for_temperature: tuple[Question, ...]

    @classmethod
    def of(cls, task: Task, seed: int) -> "Rows":
        """A random pool of the training rows, in a random order."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(task.train), generator=generator).tolist()
        rows = [task.train[index] for index in order[: POOL + TEMPERATURE_ROWS]]
        return cls(tuple(rows[:POOL]), tuple(rows[POOL:]))


@dataclass(frozen=True, eq=False)
class Fitted:
    """A posterior in its session, with the temperature of its logits."""

    session: Session
    fit: Fit
    way: PredictionOptions
    temperature: float = 1.0

    @classmethod
    def on(
        cls, session: Session, labelled: Sequence[Question], method: str, rows: Rows
    ) -> "Fitted":
        """The method fitted on labelled rows; MLE has a temperature, BLoB draws."""
        here = session.on(replace(session.task, train=tuple(labelled)))
        posterior = METHODS[method].fit(here.loaded.model, here.scorer, TRAINING)
        draws = 0 if method == "mle" else DRAWS
        fit = Fit(posterior, {}, TRAINING.bf16, method)
        found = cls(here.quietly(), fit, PredictionOptions(draws, bf16=TRAINING.bf16))
        if method != "mle":
            return found
        answers = torch.tensor([row.answer for row in rows.for_temperature])
        logits = found.logits(rows.for_temperature)
        return replace(found, temperature=best_temperature(logits, answers))

    def logits(self, rows: Sequence[Question]) -> Tensor:
        """Logits (S, N, C), over the temperature."""
        scorer = self.session.scorer
        found = self.way.passed(self.fit, scorer, scorer.encode(rows))
        return found.double() / self.temperature

    def picked(self, rows: Sequence[Question], rule: str, seed: int) -> list[str]:
        """Ids of the rows to label next."""
        if rule == "random":
            return random_rows(rows, seed)
        if rule == "bald":
            scorer = self.session.scorer
            logits, activations = self.way.watched(self.fit, scorer, scorer.encode(rows))
            order = rank_rows(logits, STEP, "bald", spread_out(activations))
        else:
            order = rank_rows(self.logits(rows), STEP, "entropy")
        return [rows[index].id for index in order.tolist()]


def figures(fitted: Fitted) -> dict[str, float]:
    """Accuracy and NLL on the test rows, and the NLL without the temperature."""
    rows = fitted.session.rows()
    labels = torch.tensor([row.answer for row in rows])
    logits = fitted.logits(rows)
    p = logits.softmax(-1).mean(0)
    plain = (logits * fitted.temperature).softmax(-1).mean(0)
    return {
        "accuracy": accuracy(p, labels),
        "nll": nll(p, labels),
        "nll_without_temperature": nll(plain, labels),
        "temperature": fitted.temperature,
    }


def random_rows(left: Sequence[Question], seed: int) -> list[str]:
    """Ids of rows drawn at random; the same for both methods."""
    order = rank_rows(torch.zeros(1, len(left), 2), STEP, "random", seed=seed)
    return [left[index].id for index in order.tolist()]


@dataclass(frozen=True)
class Cell:
    """One arm on one seed's rows of a task."""

    task: str
    seed: int
    arm: str

    def own(self, records: Sequence[Record]) -> list[Record]:
        """Its records, a round each, in order."""
        return [record for record in records if Cell.of(record) == self]

    @classmethod
    def of(cls, record: Record) -> "Cell":
        """The cell that a record is of."""
        return cls(record["task"], record["seed"], record["arm"])

    def first_fit(self, records: Sequence[Record]) -> Record | None:
        """The first round of an arm with the same method: the same fit on the same rows."""
        method = ARMS[self.arm][0]
        for record in records:
            other = Cell.of(record)
            same = (other.task, other.seed, ARMS[other.arm][0]) == (self.task, self.seed, method)
            if same and record["round"] == 0:
                return record
        return None


def next_round(session: Session, cell: Cell, records: Sequence[Record]) -> Record:
    """The record after those that are there: a fit, its figures, and which rows it picks."""
    method, rule = ARMS[cell.arm]
    rows = Rows.of(session.task, cell.seed)
    own = cell.own(records)
    number = len(own)
    labelled = [row.id for row in rows.pool[:STEP]]
    for record in own:
        labelled += record["picked"]
    left = [row for row in rows.pool if row.id not in set(labelled)]
    seed = 100 * cell.seed + number
    begin = time.process_time()
    twin = cell.first_fit(records) if number == 0 and rule == "random" else None
    picked: list[str] = []
    if twin is not None:
        found = twin["figures"]
        picked = random_rows(left, seed)
    else:
        chosen = [row for row in rows.pool if row.id in set(labelled)]
        fitted = Fitted.on(session, chosen, method, rows)
        found = figures(fitted)
        if number < ROUNDS - 1:
            picked = fitted.picked(left, rule, seed)
        detach(fitted.fit.posterior.model)
    return {
        "study": "active_labelling",
        **asdict(cell),
        "round": number,
        "labels": len(labelled),
        "figures": found,
        "picked": picked,
        "cpu_seconds": round(time.process_time() - begin, 1),
        "model": name_in_records(session.loaded.name),
        "steps": TRAINING.steps,
        "draws": DRAWS,
        "test_rows": TEST_ROWS,
        **versions(),
    }


def run(cells: Sequence[Cell], sessions: Mapping[str, Session], path: Path) -> None:
    """Runs the rounds that the file lacks, and keeps each as soon as it is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    records = read_json_lines(path, missing_ok=True)
    for cell in cells:
        while len(cell.own(records)) < ROUNDS:
            record = next_round(sessions[cell.task], cell, records)
            records.append(record)
            write_json_lines(path, records)
            print({name: record[name] for name in ("task", "seed", "arm", "labels", "figures")})


def opened(task: str, model: str, data_root: Path | None) -> Session:
    """The model, and a task whose options' texts it scores."""
    root = None if task == "everyday" else data_root
    options = TaskOptions(task=task, data_root=root, scoring="text", evaluation_rows=TEST_ROWS)
    return replace(Session.open(model, options), progress=False)


def table(records: Sequence[Record]) -> str:
    """Accuracy and NLL against labels, means over the seeds that are there; Markdown."""
    lines = []
    for task in dict.fromkeys(record["task"] for record in records):
        here = [record for record in records if record["task"] == task]
        counts = sorted({record["labels"] for record in here})
        for name, scale, digits in (("accuracy", 100, 1), ("nll", 1, 3)):
            unit = " %" if scale == 100 else ""
            title = f"{task}, {name}{unit} by number of labels (mean over seeds, their number)"
            lines += ["", title, "", f"| arm | {' | '.join(map(str, counts))} |"]
            lines.append(f"|---|{'---|' * len(counts)}")
            for arm in ARMS:
                cells = [_cell(here, arm, count, name, scale, digits) for count in counts]
                lines.append(f"| {arm} | {' | '.join(cells)} |")
            lines += [_against(here, rule, name, scale, digits) for rule in _RULES]
    return "\n".join(lines[1:]) + "\n"


# an arm with a rule and the same method with random rows
_RULES = {"BLoB, BALD": "BLoB, random", "MLE + T, entropy": "MLE + T, random"}


def _cell(
    records: Sequence[Record], arm: str, labels: int, name: str, scale: float, digits: int
) -> str:
    values = []
    for record in records:
        if record["arm"] == arm and record["labels"] == labels:
            values.append(scale * record["figures"][name])
    if not values:
        return "–"
    return f"{sum(values) / len(values):.{digits}f} ({len(values)})"


def _against(records: Sequence[Record], arm: str, name: str, scale: float, digits: int) -> str:
    """A rule against random rows: the difference over all rounds after the first, by seed."""
    differences: dict[int, list[float]] = {}
    random = {(r["seed"], r["labels"]): r for r in records if r["arm"] == _RULES[arm]}
    for record in records:
        other = random.get((record["seed"], record["labels"]))
        if record["arm"] == arm and record["round"] > 0 and other is not None:
            difference = record["figures"][name] - other["figures"][name]
            differences.setdefault(record["seed"], []).append(scale * difference)
    means = torch.tensor([sum(own) / len(own) for own in differences.values()])
    if len(means) < 2:
        return f"\n{arm} against random rows: not enough seeds yet."
    error = means.std().item() / len(means) ** 0.5
    return (
        f"\n{arm} against random rows, mean over rounds: {means.mean().item():+.{digits}f} "
        f"± {error:.{digits}f} (standard error over {len(means)} seeds)."
    )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--model", default=None)
    parser.add_argument("--data_root", type=Path, default=None)
    parser.add_argument("--task", nargs="*", default=["everyday", "arc_easy"])
    parser.add_argument("--seed", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument("--output", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    path = arguments.output / "records.jsonl"
    if arguments.what == "table":
        text = table(read_json_lines(path))
        (arguments.output / "table.md").write_text(text, encoding="utf-8")
        print(text, end="")
        return
    sessions = {task: opened(task, arguments.model, arguments.data_root) for task in arguments.task}
    cells = []
    for seed in arguments.seed:
        for task in arguments.task:
            cells += [Cell(task, seed, arm) for arm in ARMS]
    run(cells, sessions, path)


if __name__ == "__main__":
    main()
