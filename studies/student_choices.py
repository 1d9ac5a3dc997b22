"""What makes a student good? Steps, rate, its teacher's draws, its start, its rank and its rows.

    python -m studies.student_choices run --model MODEL [--task everyday] [--data_root DATA]
    python -m studies.student_choices table

One teacher is fitted for each seed, and students of it, each of which differs from the default in
one thing. All are judged on rows that no fit has seen: the validation questions of "everyday", or
held-out rows of a public task's train. "default" is the package's: 200 steps of 4 rows at 3e-4, a
fresh draw at each visit, unlabelled rows of the task, started at the teacher's mean. Records go to
results/student_choices/records.jsonl; a run goes on where it stopped.
"""

import argparse
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bayestune.adapters import attach, detach
from bayestune.cli.demo import BLOB
from bayestune.cli.demo import TRAINING as DEMO_TRAINING
from bayestune.data import Question, load_split
from bayestune.forward import Draws
from bayestune.methods import MLE, Distilled
from bayestune.methods.held_out import held_out_logits
from bayestune.posteriors import Point, Posterior, load_posterior, posterior_digest, save_posterior
from bayestune.runtime import versions
from bayestune.session import Session, TaskOptions
from bayestune.training import Training
from bayestune.whole_files import read_json_lines, write_json_lines
from studies.cheap_posteriors import figures
from studies.cheap_table import cells, difference

RECORDS = Path(__file__).parents[1] / "results/student_choices/records.jsonl"
TRAINING = replace(DEMO_TRAINING, progress=False)
DRAWS = 10  # by which the teacher is judged
FOREIGN = "rows of openbookqa"  # left out without --data_root
Record = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """A student: its settings, its rows, and its rank if it starts afresh."""

    name: str
    method: Distilled = field(default_factory=Distilled)
    rows: str = "unlabelled"
    fresh_rank: int | None = None


ARMS = (
    Arm("default"),
    Arm("training rows", rows="training"),
    Arm("training and unlabelled rows", rows="both"),
    Arm("options in three orders", rows="reordered"),
    Arm(FOREIGN, rows="foreign"),
    Arm("average of 10 draws", Distilled(draws=10)),
    Arm("100 steps", Distilled(steps=100)),
    Arm("rate 1e-4", Distilled(learning_rate=1e-4)),
    Arm("rate 1e-3", Distilled(learning_rate=1e-3)),
    Arm("afresh, rank 8", fresh_rank=8),
    Arm("400 steps", Distilled(steps=400)),
    Arm("average of 1 draw", Distilled(draws=1)),
    Arm("average of 3 draws", Distilled(draws=3)),
    Arm("average of 30 draws", Distilled(draws=30)),
    Arm("afresh, rank 2", fresh_rank=2),
    Arm("afresh, rank 32", fresh_rank=32),
)


@dataclass(frozen=True)
class Study:
    """A task's session, whose evaluation rows are those to judge on, and how a seed is fitted."""

    session: Session
    training: Training
    foreign: tuple[Question, ...]

    def teacher(self, folder: Path) -> Posterior:
        """The posterior of the seed: fitted once, then read from its folder."""
        loaded, scorer = self.session.loaded, self.session.scorer
        if not (folder / "posterior.json").is_file():
            fitted = BLOB.fit(loaded.model, scorer, self.training)
            save_posterior(fitted, folder)
            detach(fitted.model)
        posterior = load_posterior(loaded.model, folder, scorer)
        posterior.digest = posterior_digest(folder)
        return posterior

    def rows(self, kind: str) -> tuple[Question, ...]:
        """What a student learns from, without answers."""
        task = self.session.task
        rows = {
            "unlabelled": task.unlabelled,
            "training": task.train,
            "both": (*task.unlabelled, *task.train),
            "reordered": reordered(task.unlabelled, 3, self.training.seed),
            "foreign": self.foreign,
        }[kind]
        return tuple(replace(row, answer=None) for row in rows)

    def student(self, arm: Arm, folder: Path) -> Point:
        """An arm's student of the teacher in a folder."""
        task = replace(self.session.task, unlabelled=self.rows(arm.rows))
        scorer = self.session.on(task).scorer
        teacher = self.teacher(folder)
        model = self.session.loaded.model
        with tempfile.TemporaryDirectory() as scratch:
            taught = Path(scratch)
            arm.method.ask(teacher, scorer, taught, self.training)
            detach(teacher.model)
            if arm.fresh_rank:
                torch.manual_seed(self.training.seed)
                lora = replace(self.training.lora, rank=arm.fresh_rank, alpha=2 * arm.fresh_rank)
                fresh = attach(model, lora)
                save_posterior(Point(fresh, scorer), taught)
                detach(fresh)
            return arm.method.learn(model, scorer, taught, self.training)

    def judged(self, posterior: Posterior, draws: int) -> Record:
        """NLL, accuracy and ECE on the rows to judge on, and each row's loss."""
        rows = self.session.task.evaluation
        asked = Draws(draws, bf16=True)
        logits, labels = held_out_logits(posterior, self.session.scorer, rows, asked)
        detach(posterior.model)
        probabilities = logits.double().softmax(-1).mean(0)
        return figures(probabilities, labels)

    def measured(self, name: str, folder: Path) -> Record:
        """A line of the table: maximum likelihood, the teacher in two ways, or an arm."""
        if name == "MLE":
            model = self.session.loaded.model
            return self.judged(MLE().fit(model, self.session.scorer, self.training), 0)
        if name in TEACHER_DRAWS:
            return self.judged(self.teacher(folder), TEACHER_DRAWS[name])
        arm = next(arm for arm in ARMS if arm.name == name)
        rows = len(self.rows(arm.rows))
        return {"offered_rows": rows, **self.judged(self.student(arm, folder), 0)}


TEACHER_DRAWS = {"teacher's mean": 0, f"teacher, {DRAWS} draws": DRAWS}
LINES = ("MLE", *TEACHER_DRAWS, *(arm.name for arm in ARMS))


def reordered(rows: Sequence[Question], times: int, seed: int) -> tuple[Question, ...]:
    """Each row several times: as it is, then with its options in orders of chance."""
    chance = random.Random(seed)
    found = list(rows)
    for _ in range(times - 1):
        for row in rows:
            options = chance.sample(row.options, len(row.options))
            found.append(replace(row, options=tuple(options), answer=None))
    return tuple(found)


def opened(options: argparse.Namespace, seed: int) -> Session:
    """Training rows, unlabelled rows, and those to judge on as evaluation rows."""
    embedded = options.task == "everyday"
    chosen = TaskOptions(
        task=options.task,
        data_root=None if embedded else options.data_root,
        scoring="text",
        train_rows=options.train_rows,
        unlabelled_rows=options.unlabelled_rows,
        holdout=0.0 if embedded else 0.3,
        evaluation_rows=1,
        subset_seed=seed,
    )
    session = Session.open(options.model, chosen)
    task = session.task
    judged = load_split("everyday", "validation") if embedded else task.held_out[: options.rows]
    return session.on(replace(task, held_out=(), evaluation=judged))


def run(options: argparse.Namespace) -> None:
    """Computes the lines that have no record yet."""
    torch.set_num_threads(options.threads)
    records = read_json_lines(options.json, missing_ok=True)
    done = {(record["task"], record["seed"], record["line"]) for record in records}
    foreign: tuple[Question, ...] = ()
    if options.data_root and FOREIGN in options.lines:
        foreign = load_split("openbookqa", "train", options.data_root)[: options.unlabelled_rows]
    for seed in options.seeds:
        session = opened(options, seed)
        study = Study(session, replace(TRAINING, seed=seed), foreign)
        folder = options.fits / f"{options.task}-{seed}"
        facts = {"task": options.task, "seed": seed, "model": Path(options.model).name}
        facts |= {"n": len(session.task.evaluation), "train_rows": len(session.task.train)}
        for line in options.lines:
            known = (options.task, seed, line) in done
            if known or (line == FOREIGN and not foreign):
                continue
            found = study.measured(line, folder)
            records.append({**facts, "line": line, **found, "versions": versions()})
            options.json.parent.mkdir(parents=True, exist_ok=True)
            write_json_lines(options.json, records)
            print(f"{options.task}, seed {seed}, {line}: NLL {found['nll']:.3f}", flush=True)


def show(options: argparse.Namespace) -> None:
    """Prints a table for each task and seed."""
    print(table(read_json_lines(options.json)))


def table(records: Sequence[Record]) -> str:
    """Each line's figures, and its loss less the default student's with two standard errors."""
    lines: list[str] = []
    for task, seed in dict.fromkeys((one["task"], one["seed"]) for one in records):
        own = [one for one in records if (one["task"], one["seed"]) == (task, seed)]
        default = next((one for one in own if one["line"] == "default"), None)
        lines += [
            f"| {task}, seed {seed}, n={own[0]['n']} | NLL / ECE % / ACC % | NLL − default's |",
            "| --- | --- | --- |",
        ]
        for one in own:
            apart = difference(one["losses"], default["losses"]) if default else ""
            apart = "" if one is default else apart
            lines.append(f"| {one['line']} | {cells(one)} | {apart} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(description=__doc__)
    commands = made.add_subparsers(required=True)
    runs = commands.add_parser("run")
    runs.add_argument("--model", required=True)
    runs.add_argument("--task", default="everyday")
    runs.add_argument("--data_root", type=Path)
    runs.add_argument("--train_rows", type=int, default=96, help="of the teacher")
    runs.add_argument("--unlabelled_rows", type=int, default=144, help="of the students")
    runs.add_argument("--rows", type=int, default=200, help="of a public task, to judge on")
    runs.add_argument("--lines", nargs="+", default=LINES, choices=LINES)
    runs.add_argument("--seeds", nargs="+", type=int, default=[1])
    runs.add_argument("--fits", type=Path, default=Path("runs/student_choices"))
    runs.add_argument("--threads", type=int, default=1)
    runs.set_defaults(act=run)
    shown = commands.add_parser("table")
    shown.set_defaults(act=show)
    for command in (runs, shown):
        command.add_argument("--json", type=Path, default=RECORDS)
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the options and runs."""
    options = parser().parse_args(arguments)
    options.act(options)


if __name__ == "__main__":
    main()
