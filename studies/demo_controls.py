"""The demo's student and every control of it, with more seeds than the demo's one.

    python -m studies.demo_controls --model MODEL [--seeds 1 2]
    bayestune table results/demo_controls --against "BLoB N=10"

On the demo's questions and with its settings: what the demo compares, an ensemble of 3, and the
students of maximum likelihood, of it at its temperature, and of the ensemble. The demo's student
learns from the questions that temperatures are fitted on, so the student with a temperature learns
from the other 144 alone. `--fits` keeps the fits; a seed whose records are there is left out.
"""

import argparse
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bayestune.cli.comparing_methods import Run, compare_methods
from bayestune.cli.demo import (
    BLOB,
    PREDICTING,
    QUESTIONS,
    STUDENT_STEPS,
    TRAINING,
    demo_methods,
    demo_task,
)
from bayestune.cli.demo import LABELS as DEMO_LABELS
from bayestune.cli.output_folder import OutputFolder
from bayestune.data import Task
from bayestune.evaluation import RECORDS, read_records
from bayestune.methods import MLE, Distilled, Ensemble, Method, Temperature
from bayestune.session import Session
from bayestune.whole_files import write_json_lines

RESULTS = Path(__file__).parents[1] / "results/demo_controls"
SIZE = 3  # members of the ensemble
LABELS = {
    **DEMO_LABELS,
    "ensemble": f"Ensemble of {SIZE}",
    "student of mle": "Student of MLE",
    "student of tempered mle": "Student of MLE + temperature",
    "student of ensemble": "Student of ensemble",
    "student of fewer": "Student, 144 questions",
    "student of fewer, tempered": "Student, 144 questions + temperature",
}


def controls(task: Task) -> list[tuple[Task, Mapping[str, Method]]]:
    """What is compared, in two parts: on the demo's task, and with its own unlabelled rows alone.

    Args:
        task: of the demo; its held-out rows are among its unlabelled ones.
    """
    known = {row.fingerprint for row in task.held_out}
    fewer = tuple(row for row in task.unlabelled if row.fingerprint not in known)

    def student(base: Method) -> Distilled:
        return Distilled(base, steps=STUDENT_STEPS)

    on_all: dict[str, Method] = {
        **demo_methods(),
        "ensemble": Ensemble(MLE(), SIZE),
        "student of mle": student(MLE()),
        "student of tempered mle": student(Temperature(MLE())),
        "student of ensemble": student(Ensemble(MLE(), SIZE)),
    }
    on_fewer: dict[str, Method] = {
        "student of fewer": student(BLOB),
        "student of fewer, tempered": Temperature(student(BLOB)),
    }
    return [(task, on_all), (replace(task, unlabelled=fewer), on_fewer)]


def computed(model: str, seed: int, fits: Path) -> list[Path]:
    """The folders of a seed's two parts, each with its records and rows."""
    training = replace(TRAINING, seed=seed, progress=False)
    session = Session.open(model, QUESTIONS, task=demo_task()).quietly()
    folders = []
    for part, (task, methods) in enumerate(controls(session.task)):
        folder = fits / f"seed-{seed}-{part}"
        run = Run(OutputFolder(folder, overwrite=True), labels=LABELS)
        compare_methods(session.on(task), methods, training, PREDICTING, run)
        folders.append(folder)
    return folders


def add(folder: Path, results: Path) -> None:
    """Adds a folder's records and rows to the results."""
    results.mkdir(parents=True, exist_ok=True)
    records = read_records(results)
    for record in read_records(folder):
        rows = f"{folder.name}-{record['predictions']}"
        shutil.copyfile(folder / record["predictions"], results / rows)
        records.append({**record, "predictions": rows})
    write_json_lines(results / RECORDS, records)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the options and runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--fits", type=Path, default=Path("runs/demo_controls"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    done = {record["seed"] for record in read_records(options.results)}
    for seed in options.seeds:
        if seed not in done:
            for folder in computed(options.model, seed, options.fits):
                add(folder, options.results)


if __name__ == "__main__":
    main()
