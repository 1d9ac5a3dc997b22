"""Which score earns its price? Realised risk by score, and what each adds to the one-pass scores.

    python -m studies.score_price collect FIT … --data_root DATA [--model MODEL]
    python -m studies.score_price table

`collect` takes folders of `fit`, such as those that `bench` keeps under OUTPUT/fits, and keeps the
logits of the mean and of ten draws on the task's evaluation rows, prompt lengths, and distances
from the training rows in the mean's activations; run again, it does what is missing. A BLoB whose
MLE of the same task and seed is among the folders has a control: the MLE with isotropic noise on
every A, of the Frobenius norm that the BLoB's standard deviations have there. `table` writes
the records and the table of what was collected.

A posterior costs 11 passes a row and one for each training row, and so does its control: with 400
rows, a 0.5B model in bfloat16 and OpenBookQA's prompts (0.32 s a pass) 25 minutes each on one
thread; passages take longer by their length.
"""

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bayestune.adapters import GaussianLinear, Slots, detach, make_gaussian
from bayestune.data import own_task
from bayestune.decisions import Distance
from bayestune.posteriors import Gaussian, Point, Posterior
from bayestune.runtime import versions
from bayestune.session import (
    DISTANCE,
    PROMPT_LENGTH,
    PredictionOptions,
    RowPredictor,
    Session,
    TaskOptions,
    details_of,
    name_in_records,
)
from bayestune.whole_files import replaced, write_json_lines
from studies.score_price_table import Collected, records_of, table

FOLDER = Path(__file__).parents[1] / "results/decisions/scores"
DRAWS = 10
NOISE = "noise on MLE"


@dataclass(frozen=True)
class Folder:
    """A folder of `fit`, and what it says of itself."""

    path: Path
    details: Mapping[str, Any]

    @classmethod
    def of(cls, path: Path) -> "Folder":
        """Reads `posterior.json`."""
        return cls(path, details_of(path))

    @property
    def method(self) -> str:
        """The key of its method."""
        return self.details["method"]

    @property
    def origin(self) -> dict[str, Any]:
        """What a posterior and its control share."""
        return {
            "model": name_in_records(self.details["base_model"]),
            "task": self.details["task"]["name"],
            "seed": self.details["training"]["seed"],
            "train_rows": self.details["train_rows"],
        }

    def session(self, data_root: Path, model: str | None, **changed: Any) -> Session:
        """The rows of its task, with the training rows that it was fitted on.

        Args:
            data_root: where its public task is.
            model: the base model, where it has moved.
            changed: fields of `TaskOptions` that differ from the fit's.
        """
        questions = dict(self.details["questions"])
        for name in ("data", "evaluation_data", "unlabelled_data"):
            questions.pop(name, None)
        questions |= {"data_root": data_root, "options": ()}  # a public task has its own
        session = Session.of_posterior(self.path, TaskOptions(**questions | changed), model)
        return replace(session, progress=False)


def collect(options: argparse.Namespace) -> None:
    """Keeps what is missing of every folder, a file each."""
    folders = [Folder.of(path) for path in options.fits]
    mles = [folder for folder in folders if folder.method == "mle"]
    options.output.mkdir(parents=True, exist_ok=True)
    for folder in folders:
        if folder.method not in options.methods:
            continue
        path = options.output / f"{folder.path.name}.safetensors"
        if not path.is_file():
            keep(path, folder, folder.method, options)
        control = options.output / f"{folder.path.name}--noise.safetensors"
        same = [mle for mle in mles if mle.origin == folder.origin]
        if folder.method == "blob" and same and not control.is_file():
            keep(control, same[0], NOISE, options, norms_of(folder.path))


def norms_of(blob: Path) -> dict[str, float]:
    """‖Ω‖_F of each slot of a saved Gaussian, Ω = G²."""
    found = {}
    for name, root in load_file(blob / "posterior.safetensors").items():
        slot, _, part = name.rpartition(".")
        if part == "root_std":
            found[slot] = root.double().square().norm().item()
    return found


def keep(
    path: Path,
    folder: Folder,
    method: str,
    options: argparse.Namespace,
    norms: Mapping[str, float] | None = None,
) -> None:
    """Predicts with one posterior, or with its adapter under noise of these norms."""
    rows_asked = {"evaluation_rows": options.rows, "unlabelled_rows": 0}
    session = folder.session(options.data_root, options.model, **rows_asked)
    fit = session.load(folder.path)
    begin = time.process_time()
    if norms is not None:
        fit = replace(fit, posterior=noisy(fit.posterior, norms))
    scorer = session.quietly().scorer
    rows = session.task.evaluation
    way = PredictionOptions(DRAWS, bf16=fit.bf16)
    training = session.quietly().on(own_task("training", (), session.task.train))
    trained = RowPredictor(fit, way, scorer).activations(training.task.evaluation)
    predictor = RowPredictor(fit, replace(way, draws=0), scorer, Distance.fit(trained))
    mean = predictor.over(rows)
    drawn = RowPredictor(fit, way, scorer).over(rows)
    facts = {
        **folder.origin,
        "fit": folder.path.name,
        "method": method,
        "cpu_seconds": round(time.process_time() - begin, 1),
        "ids": [row.id for row in rows],
        "versions": versions(),
    }
    tensors = {
        "mean": mean.logits,
        "draws": drawn.logits,
        DISTANCE: mean.extra[DISTANCE],
        PROMPT_LENGTH: mean.extra[PROMPT_LENGTH],
        "labels": torch.tensor([row.answer for row in rows]),
    }
    kept = {name: values.contiguous() for name, values in tensors.items()}
    with replaced(path) as scratch:
        save_file(kept, scratch, {"facts": json.dumps(facts)})
    print(f"{path.name}: {facts['cpu_seconds']} s of one thread for {len(rows)} rows", flush=True)
    detach(fit.posterior.model)


def noisy(posterior: Posterior, norms: Mapping[str, float]) -> Gaussian:
    """The adapter of a point with N(0, σ²) on every number of A, σ = norm/√(r k).

    Raises:
        ValueError: if it is no point, or has other slots.
    """
    slots = Slots(posterior.model, posterior.adapter)
    if not isinstance(posterior, Point) or set(norms) != set(slots.names()):
        kind = type(posterior).__name__
        raise ValueError(f"got a {kind} and norms of {len(norms)} slots, expected a point's own")
    make_gaussian(slots)
    for name, layer in slots.of_kind(GaussianLinear).items():
        std = norms[name] / math.sqrt(layer.weight.numel())
        torch.nn.init.constant_(layer.root_std, math.sqrt(std))
    return Gaussian(posterior.model.eval(), posterior.scorer, adapter=posterior.adapter)


def read(path: Path) -> Collected:
    """What `keep` wrote."""
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["facts"])
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return Collected(facts, **tensors)


def tell(output: Path, records: Sequence[Mapping[str, Any]], text: str) -> None:
    """Writes the records and the table, and prints the table."""
    write_json_lines(output / "records.jsonl", records)
    (output / "table.md").write_text(text, encoding="utf-8")
    print(text, end="")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("what", choices=("collect", "table"))
    parser.add_argument("fits", nargs="*", type=Path, help="folders of `fit`")
    parser.add_argument("--data_root", type=Path, default=None)
    parser.add_argument("--model", default=None, help="the base model, where it has moved")
    parser.add_argument("--methods", nargs="*", default=["blob"])
    parser.add_argument("--rows", type=int, default=400, help="evaluation rows at most")
    parser.add_argument("--risks", nargs="*", type=float, default=[0.05, 0.1, 0.2, 0.3])
    parser.add_argument("--output", type=Path, default=FOLDER)
    options = parser.parse_args(arguments)
    if options.what == "collect":
        collect(options)
        return
    records = []
    for path in sorted(options.output.glob("*.safetensors"), key=lambda path: path.stem):
        records += records_of(read(path), options.risks)
    tell(options.output, records, table(records))


if __name__ == "__main__":
    main()
