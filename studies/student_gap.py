"""How near is a student to its teacher, on rows that it learnt and on held-out rows with labels?

    python -m studies.student_gap collect TEACHER STUDENT --data_root DATA [--model MODEL]
    python -m studies.student_gap table

Takes the folders of a posterior and of its student, fitted on a public task with held-out rows.
For each part it keeps KL(p̄ ‖ p) from the teacher's ten draws to its mean, where the student
started, and to the student, and on the held-out rows their NLL. A student that is as far from p̄ on
rows that it learnt as on others has not been trained enough; one that is near there alone has seen
too few rows.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayestune.adapters import detach
from bayestune.data import Question
from bayestune.runtime import versions
from bayestune.session import PredictionOptions, RowPredictor, Session
from bayestune.whole_files import read_json_lines, write_json_lines
from studies.cheap_posteriors import figures
from studies.cheap_table import difference
from studies.score_price import Folder

RECORDS = Path(__file__).parents[1] / "results/student_gap/records.jsonl"
DRAWS = 10
NAMES = ("mean", "student")  # what is compared with the teacher's draws
Record = dict[str, Any]


def probabilities(session: Session, folder: Folder, rows: Sequence[Question], draws: int) -> Tensor:
    """The draws' average (N, C) in float64; 0 draws are the mean."""
    fit = session.load(folder.path)
    options = PredictionOptions(draws, bf16=fit.bf16)
    logits = RowPredictor(fit, options, session.scorer).over(rows).logits
    detach(fit.posterior.model)
    return logits.double().softmax(-1).mean(0)


def divergences(average: Tensor, other: Tensor) -> list[float]:
    """KL(p̄ ‖ p) of each row, from (N, C) each; an option that a row lacks adds 0."""
    terms = average * (average.clamp_min(1e-300).log() - other.clamp_min(1e-300).log())
    return [round(value, 5) for value in terms.sum(-1).tolist()]


def part_of(session: Session, folders: Sequence[Folder], rows: Sequence[Question]) -> Record:
    """What teacher's mean, teacher's draws and student say of rows."""
    teacher, student = folders
    average = probabilities(session, teacher, rows, DRAWS)
    others = {
        "mean": probabilities(session, teacher, rows, 0),
        "student": probabilities(session, student, rows, 0),
    }
    found: Record = {name: {"kl": divergences(average, each)} for name, each in others.items()}
    if all(row.answer is not None for row in rows):
        labels = torch.tensor([row.answer for row in rows])
        for name, each in {f"{DRAWS} draws": average, **others}.items():
            found.setdefault(name, {})["losses"] = figures(each, labels)["losses"]
    return found


def collect(options: argparse.Namespace) -> None:
    """Adds a record, unless the student has one."""
    torch.set_num_threads(options.threads)
    folders = [Folder.of(path) for path in options.folders]
    origin = {**folders[1].origin, "fit": folders[1].path.name}
    records = read_json_lines(options.json, missing_ok=True)
    if any(origin.items() <= record.items() for record in records):
        return
    session = folders[1].session(options.data_root, options.model).quietly()
    parts = {
        "learnt": session.task.unlabelled[: options.rows],
        "held_out": session.task.held_out[: options.rows],
    }
    found = {name: part_of(session, folders, rows) for name, rows in parts.items()}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    write_json_lines(options.json, [*records, {**origin, **found, "versions": versions()}])


def show(options: argparse.Namespace) -> None:
    """Prints a line for each student."""
    print(table(read_json_lines(options.json)))


def table(records: Sequence[Record]) -> str:
    """KL to mean and student on both parts, NLL on the held-out one; ± two standard errors."""
    heads = ["task", "seed"]
    heads += [f"KL to {name}, {part}" for part in ("learnt", "held-out") for name in NAMES]
    heads += ["NLL: mean", f"{DRAWS} draws", "student", "student − draws"]
    lines = [f"| {' | '.join(heads)} |", f"| {' | '.join('---' for _ in heads)} |"]
    for record in records:
        cells = [record["task"], str(record["seed"])]
        cells += [
            _spread(record[part][name]["kl"]) for part in ("learnt", "held_out") for name in NAMES
        ]
        held_out = record["held_out"]
        nats = {name: torch.tensor(each["losses"]) for name, each in held_out.items()}
        cells += [f"{nats[name].mean():.3f}" for name in ("mean", f"{DRAWS} draws", "student")]
        first, second = (held_out[name]["losses"] for name in ("student", f"{DRAWS} draws"))
        cells.append(difference(first, second))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    """The mean and two standard errors."""
    numbers = torch.tensor(values, dtype=torch.float64)
    error = numbers.std() / len(numbers) ** 0.5
    return f"{numbers.mean():.3f} ± {2 * error:.3f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the options and runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    collects = commands.add_parser("collect")
    collects.add_argument("folders", nargs=2, type=Path, help="of the teacher and of its student")
    collects.add_argument("--data_root", type=Path, required=True)
    collects.add_argument("--model", help="the base model, where it has moved")
    collects.add_argument("--rows", type=int, default=60, help="of each part")
    collects.add_argument("--threads", type=int, default=1)
    collects.set_defaults(act=collect)
    shown = commands.add_parser("table")
    shown.set_defaults(act=show)
    for command in (collects, shown):
        command.add_argument("--json", type=Path, default=RECORDS)
    options = parser.parse_args(arguments)
    options.act(options)


if __name__ == "__main__":
    main()
