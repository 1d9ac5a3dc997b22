"""Can a student tell in its one pass how much its teacher's draws disagree?

    python -m studies.epistemic_head collect TEACHER STUDENT --data_root DATA [--model MODEL]
    python -m studies.epistemic_head table

A student answers as its teacher's draws do on average; how much they disagree, their mutual
information, is lost. A head on the same pass could bring it back. `collect` takes the folders of a
posterior and of its student, fitted on a public task, and keeps for rows of *train* the logits of
the teacher's ten draws, and the student's logits and activations A x from one pass. The first rows
are those that the student learnt on, where heads are fitted without a label; the others are
further rows of train that neither saw, where heads are judged. `table` fits the heads and writes
the records and the table.

A head is worth having if it orders new rows nearly as the draws do, and finds errors that the
student's own probabilities do not.

A row costs 11 passes: with 400 rows, a 0.5B model in bfloat16 and ARC's prompts (0.3 s a pass)
22 minutes on one thread.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bayestune.adapters import detach
from bayestune.data import Question, load_task
from bayestune.runtime import versions
from bayestune.session import PredictionOptions, RowPredictor, Session
from bayestune.whole_files import replaced
from studies.epistemic_heads import PARTS, Collected, Part
from studies.epistemic_table import record_of, table
from studies.score_price import Folder, tell

FOLDER = Path(__file__).parents[1] / "results/epistemic_head"
DRAWS = 10


@dataclass(frozen=True)
class Pair:
    """The folders of a posterior and of its student, and where their rows and base model are."""

    teacher: Folder
    student: Folder
    data_root: Path
    model: str | None

    def parts(self, fitted: int, judged: int) -> tuple[Session, dict[str, list[Question]]]:
        """A session, and its rows: some that the student learnt on, and as many further ones.

        Raises:
            ValueError: if the student learnt on fewer rows than heads shall be fitted on.
        """
        learnt = self.student.details["questions"]["unlabelled_rows"]
        if learnt < fitted:
            raise ValueError(f"got a student of {learnt} rows, expected {fitted} or more")
        wanted = learnt + judged
        session = self.student.session(self.data_root, self.model, unlabelled_rows=wanted).quietly()
        train = load_task(session.task.name, self.data_root).train
        answers = {row.id: row.answer for row in train}
        rows = [replace(row, answer=answers[row.id]) for row in session.task.unlabelled]
        return session, dict(zip(PARTS, (rows[:fitted], rows[learnt:]), strict=True))


def collect(options: argparse.Namespace) -> None:
    """Keeps what teacher and student say of the rows, in one file."""
    teacher, student = (Folder.of(path) for path in options.folders)
    path = options.output / f"{student.path.name}.safetensors"
    if path.is_file():
        return
    options.output.mkdir(parents=True, exist_ok=True)
    pair = Pair(teacher, student, options.data_root, options.model)
    session, parts = pair.parts(options.fitted, options.judged)
    begin = time.process_time()
    tensors: dict[str, Tensor] = {}
    for part, rows in parts.items():
        tensors[f"{part}.labels"] = torch.tensor([row.answer for row in rows])
        tensors |= {f"{part}.{name}": values for name, values in of_student(session, student, rows)}
        tensors[f"{part}.draws"] = of_teacher(session, teacher, rows)
    facts = {
        **student.origin,
        "teacher": teacher.method,
        "fit": student.path.name,
        "rows": {part: [row.id for row in rows] for part, rows in parts.items()},
        "cpu_seconds": round(time.process_time() - begin, 1),
        "versions": versions(),
    }
    with replaced(path) as scratch:
        kept = {name: values.contiguous() for name, values in tensors.items()}
        save_file(kept, scratch, {"facts": json.dumps(facts)})
    print(f"{path.name}: {facts['cpu_seconds']} s of one thread", flush=True)


def of_student(
    session: Session, folder: Folder, rows: Sequence[Question]
) -> list[tuple[str, Tensor]]:
    """Logits (N, C), and the activations of all slots side by side, (N, k)."""
    fit = session.load(folder.path)
    predictor = RowPredictor(fit, PredictionOptions(0, bf16=fit.bf16), session.scorer)
    logits = predictor.over(rows).logits[0]
    activations = torch.cat(list(predictor.activations(rows).values()), 1)
    detach(fit.posterior.model)
    return [("logits", logits), ("activations", activations)]


def of_teacher(session: Session, folder: Folder, rows: Sequence[Question]) -> Tensor:
    """The draws' logits, (S, N, C)."""
    fit = session.load(folder.path)
    draws = PredictionOptions(DRAWS, bf16=fit.bf16)
    logits = RowPredictor(fit, draws, session.scorer).over(rows).logits
    detach(fit.posterior.model)
    return logits


def read(path: Path) -> Collected:
    """What `collect` wrote."""
    with safe_open(path, "pt") as file:
        facts: Mapping[str, Any] = json.loads(file.metadata()["facts"])
        names = ("draws", "logits", "activations", "labels")
        parts = [Part(*(file.get_tensor(f"{part}.{name}") for name in names)) for part in PARTS]
    return Collected(facts, *parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("what", choices=("collect", "table"))
    parser.add_argument("folders", nargs="*", type=Path, help="a posterior's and its student's")
    parser.add_argument("--data_root", type=Path, default=None)
    parser.add_argument("--model", default=None, help="the base model, where it has moved")
    parser.add_argument("--fitted", type=int, default=200, help="rows to fit heads on")
    parser.add_argument("--judged", type=int, default=200, help="rows to judge them on")
    parser.add_argument("--output", type=Path, default=FOLDER)
    options = parser.parse_args(arguments)
    if options.what == "collect":
        collect(options)
        return
    paths = sorted(options.output.glob("*.safetensors"))
    records = [record_of(read(path)) for path in paths]
    tell(options.output, records, table(records))


if __name__ == "__main__":
    main()
