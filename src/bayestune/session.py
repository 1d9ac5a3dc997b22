"""What every command needs: the questions, the output folder, a model, a posterior and its scorer."""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from bayestune.data import Prompt, Scoring, Task, load_rows, load_task, own_task
from bayestune.methods import Method, described
from bayestune.models import LoadedModel, load_default, load_model
from bayestune.posteriors import (
    DETAILS,
    FitReport,
    Posterior,
    load_posterior,
    read_details,
    save_posterior,
)
from bayestune.scoring import Scorer, make_scorer
from bayestune.training import Training

logger = logging.getLogger(__name__)

TRAINING = "training.json"
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class TaskOptions:
    """Which questions, and how they are put.

    Args:
        task: a task of the table; your own rows (`data`, `evaluation_data`) go before it.
        data_root: a directory in the Hub's layout; None for the Hub.
        data: your own training rows, a JSONL or CSV file.
        evaluation_data: your own evaluation rows.
        options: the options of every row of your files that has none of its own.
        scoring: "letter" compares the answer tokens' logits, "text" the likelihoods of the options' texts.
        max_length: tokens of a prompt.
        holdout: the part of train held out for choosing anything.
        train_rows: use at most so many training rows.
        evaluation_rows: use at most so many evaluation rows.
        subset_seed: of the choice of rows.
    """

    task: str = "everyday"
    data_root: Path | None = None
    data: Path | None = None
    evaluation_data: Path | None = None
    options: tuple[str, ...] = ()
    scoring: Scoring = "letter"
    max_length: int = 300
    holdout: float = 0.0
    train_rows: int | None = None
    evaluation_rows: int | None = None
    subset_seed: int = 0

    def load(self) -> Task:
        """The task with its parts chosen."""
        if self.data or self.evaluation_data:
            train = load_rows(self.data, self.options) if self.data else ()
            test = load_rows(self.evaluation_data, self.options) if self.evaluation_data else ()
            task = own_task(Path(self.data or self.evaluation_data or "").stem, train, test)
        else:
            task = load_task(self.task, self.data_root)
        return task.subset(self.train_rows, self.evaluation_rows, self.holdout, self.subset_seed)


def check_output(folder: Path, *, overwrite: bool, resume: bool = False) -> None:
    """Refuses an output folder that holds something, unless told to overwrite it or to go on.

    Raises:
        FileExistsError: if the folder is not empty.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (overwrite or resume):
        raise FileExistsError(
            f"{folder} is not empty: choose another --output, or give --overwrite or --resume"
        )


def prepare_output(folder: Path, *, overwrite: bool, resume: bool = False) -> None:
    """Makes the output folder, emptied unless a run goes on in it: when all input has been read and found good.

    Raises:
        FileExistsError: as `check_output`.
    """
    check_output(folder, overwrite=overwrite, resume=resume)
    if folder.is_dir() and not resume:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)


def open_model(
    name: str | None, dtype: Dtype = "float32", num_labels: int | None = None
) -> LoadedModel:
    """The model of that name; the default one if there is none.

    Args:
        name: as for `models.load_model`.
        dtype: of the weights; adapters are float32 in any case.
        num_labels: classes of a classification head; None for a language model.
    """
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "num_labels": num_labels}
    loaded = load_default(**options) if name is None else load_model(name, **options)
    if torch.accelerator.is_available():
        loaded.model.to(torch.accelerator.current_accelerator())  # type: ignore[arg-type]
    return loaded


def fit_method(
    method: Method,
    loaded: LoadedModel,
    scorer: Scorer,
    training: Training,
    questions: TaskOptions,
    output: Path,
) -> Posterior:
    """Fits a method and saves its posterior in `output`, checkpoints under `output/checkpoints`.

    With `training.resume`, a posterior that was saved already is loaded instead.
    """
    if training.resume and (output / DETAILS).is_file():
        return _saved(loaded, scorer, output)
    logger.info("fitting %s on %d rows", type(method).__name__, len(scorer.task.train))
    posterior = method.fit(loaded.model, scorer, replace(training, output=output / "checkpoints"))
    save_fit(posterior, method, loaded, scorer, training, questions, output)
    return posterior


def save_fit(
    posterior: Posterior,
    method: Method,
    loaded: LoadedModel,
    scorer: Scorer,
    training: Training,
    questions: TaskOptions,
    output: Path,
) -> None:
    """Saves a posterior with all that a later command needs to ask it."""
    prompt = scorer.task.prompt
    details = {
        "method": type(method).__name__.lower(),
        "fields": described(method),
        "base_model": loaded.name,
        "task": {"name": scorer.task.name, "prompt": asdict(prompt)},
        "scoring": questions.scoring,
        "classes": classes_of(scorer.task, questions.scoring),
        "dtype": str(next(loaded.model.parameters()).dtype).removeprefix("torch."),
        "max_length": questions.max_length,
        "training": asdict(training),
        "train_rows": len(scorer.task.train),
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / TRAINING).write_text(
        json.dumps(posterior.report.as_dict(), indent=1) + "\n", encoding="utf-8"
    )
    save_posterior(
        posterior, output, details
    )  # last, for a folder with a posterior is taken for finished


def _saved(loaded: LoadedModel, scorer: Scorer, folder: Path) -> Posterior:
    posterior = load_posterior(loaded.model, folder, scorer)
    report = json.loads((folder / TRAINING).read_text(encoding="utf-8"))
    posterior.report = FitReport.of_dict(report)
    return posterior


def open_folder(folder: Path, model: str | None = None) -> tuple[dict[str, Any], LoadedModel]:
    """What a posterior's folder says, and its base model; `scorer_of` and `load_posterior` do the rest."""
    details = read_details(folder)
    classes = details["classes"] if details["scoring"] == "head" else None
    return details, open_model(model or details.get("base_model"), details["dtype"], classes)


def classes_of(task: Task, scoring: Scoring) -> int | None:
    """Classes of the head that a task asks for; None where it is put to a language model."""
    return len(next(iter((*task.train, *task.evaluation))).options) if scoring == "head" else None


def scorer_of(details: Mapping[str, Any], loaded: LoadedModel, task: Task) -> Scorer:
    """The scorer a posterior was fitted with, on other questions."""
    return make_scorer(
        loaded.model, loaded.tokenizer, task, details["scoring"], details["max_length"]
    )


def prompt_of(details: Mapping[str, Any]) -> Prompt:
    """The templates a posterior was fitted with."""
    prompt = details["task"]["prompt"]
    return Prompt(prompt["letter"], prompt["text"], tuple(prompt["labels"]))


def shown(model: str) -> str:
    """A model's name in records and tables: without the folders of this machine where it is a path."""
    return Path(model).name if Path(model).exists() else model
