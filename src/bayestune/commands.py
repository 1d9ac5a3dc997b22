"""What the commands do: fit, evaluate, predict, compare, demo. Parsing is in `cli.py`."""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from bayestune.artefact import load_posterior, read_details, save_posterior
from bayestune.evaluation import (
    Predicting,
    append_record,
    draw_logits,
    evaluate_posterior,
    prediction_rows,
    read_records,
    write_json_lines,
)
from bayestune.methods import Method
from bayestune.models import LoadedModel, load_default, load_model
from bayestune.posterior import Draws, Gaussian, Point, Posterior, Prediction
from bayestune.scoring import Scorer, make_scorer
from bayestune.tasks import Prompt, Question, Scoring, Task, check_trainable, load_rows, load_task, own_task
from bayestune.training import Training

Part = Literal["evaluation", "held_out"]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Questions:
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
        raise FileExistsError(f"{folder} is not empty: choose another --output, or give --overwrite or --resume")


def prepare_output(folder: Path, *, overwrite: bool, resume: bool = False) -> None:
    """Makes the output folder, emptied unless a run goes on in it: when all input has been read and found good.

    Raises:
        FileExistsError: as `check_output`.
    """
    check_output(folder, overwrite=overwrite, resume=resume)
    if folder.is_dir() and not resume:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)


def open_model(name: str | None) -> LoadedModel:
    """The model of that name; the default one if there is none."""
    loaded = load_default() if name is None else load_model(name)
    if torch.accelerator.is_available():
        loaded.model.to(torch.accelerator.current_accelerator())  # type: ignore[arg-type]
    return loaded


def fit_method(
    method: Method, loaded: LoadedModel, scorer: Scorer, training: Training, questions: Questions, output: Path
) -> Posterior:
    """Fits a method and saves its posterior in `output`, checkpoints under `output/checkpoints`."""
    posterior = method.fit(loaded.model, scorer, replace(training, output=output / "checkpoints"))
    prompt = scorer.task.prompt
    details = {
        "method": type(method).__name__.lower(),
        "fields": asdict(method),  # type: ignore[call-overload]
        "base_model": loaded.name,
        "task": {"name": scorer.task.name, "prompt": asdict(prompt)},
        "scoring": questions.scoring,
        "max_length": questions.max_length,
        "training": asdict(training),
        "train_rows": len(scorer.task.train),
    }
    save_posterior(posterior.model, output, details)
    log = {key: posterior.fitted[key] for key in ("seconds", "steps", "peak_memory_mb", "history")}
    (output / "training.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    return posterior


def open_posterior(folder: Path, model: str | None = None) -> tuple[Posterior, dict[str, Any], LoadedModel]:
    """Loads a posterior with its base model; `scorer_of` makes its scorer."""
    details = read_details(folder)
    loaded = open_model(model or details.get("base_model"))
    adapted, _ = load_posterior(loaded.model, folder)
    kind = Gaussian if details["posterior"] == "gaussian" else Point

    def unbound(*_: Any) -> torch.Tensor:
        raise AssertionError("the posterior has no scorer yet")

    return kind(adapted, unbound), details, loaded


def scorer_of(details: Mapping[str, Any], loaded: LoadedModel, base: nn.Module, task: Task) -> Scorer:
    """The scorer a posterior was fitted with, on other questions."""
    return make_scorer(base, loaded.tokenizer, task, details["scoring"], details["max_length"])


def run_fit(
    model: str | None, method: Method, questions: Questions, training: Training, output: Path, *, overwrite: bool
) -> None:
    """`bayestune fit`."""
    check_output(output, overwrite=overwrite, resume=training.resume)
    task, loaded = questions.load(), open_model(model)
    check_trainable(task)
    scorer = make_scorer(loaded.model, loaded.tokenizer, task, questions.scoring, questions.max_length)
    prepare_output(output, overwrite=overwrite, resume=training.resume)
    fit_method(method, loaded, scorer, training, questions, output)
    print(f"posterior in {output}")  # noqa: T201


def run_evaluate(
    posterior: Path, model: str | None, questions: Questions, settings: Predicting, output: Path | None, *, bf16: bool
) -> None:
    """`bayestune evaluate`: appends records to the posterior's folder, or to `output`."""
    opened, details, loaded = open_posterior(posterior, model)
    task = questions.load()
    if not task.evaluation:
        raise ValueError("no evaluation rows: give --task with an evaluation split, or --evaluation_data")
    scorer = scorer_of(details, loaded, loaded.model, task)
    opened.score = scorer
    folder = output or posterior
    folder.mkdir(parents=True, exist_ok=True)
    base = {
        "method": details["method"],
        "model": shown(details["base_model"]),
        "train_rows": details["train_rows"],
        "scoring": details["scoring"],
        "seed": details["training"]["seed"],
        "config": {"method": details["fields"], "training": details["training"], "predicting": asdict(settings)},
    }
    _record_all(opened, scorer, settings, folder, {**base, "task": task.name}, bf16=bf16)
    _show(read_records(folder))


def run_predict(
    posterior: Path,
    model: str | None,
    rows: Path,
    options: Sequence[str],
    draws: int,
    draw_seed: int,
    output: Path | None,
    *,
    bf16: bool,
    overwrite: bool = False,
) -> None:
    """`bayestune predict`: rows in, one JSON object a row out, to a file or to standard output."""
    if output and output.exists() and not overwrite:
        raise FileExistsError(f"{output} is there already: choose another --output, or give --overwrite")
    opened, details, loaded = open_posterior(posterior, model)
    questions = load_rows(rows, options, labelled=False)
    task = Task(details["task"]["name"], (), questions, prompt=_prompt(details))
    scorer = scorer_of(details, loaded, loaded.model, task)
    opened.score = scorer
    title = f"predict, {draws} draws" if output else None
    logits = draw_logits(opened, scorer, scorer.encode(questions), Draws(draws, draw_seed), bf16=bf16, progress=title)
    lines = prediction_rows(questions, Prediction.of(logits))
    if output:
        write_json_lines(output, lines)
    else:
        print("\n".join(json.dumps(line, ensure_ascii=False) for line in lines))  # noqa: T201


def _prompt(details: Mapping[str, Any]) -> Prompt:
    prompt = details["task"]["prompt"]
    return Prompt(prompt["letter"], prompt["text"], tuple(prompt["labels"]))


def label_of(method: str, draws: int, posterior: Posterior) -> str:
    """How a line of the table is called."""
    return method if isinstance(posterior, Point) else f"{method} N={draws}"


def shown(model: str) -> str:
    """A model's name in records and tables: without the folders of this machine where it is a path."""
    return Path(model).name if Path(model).exists() else model


def _record_all(
    posterior: Posterior,
    scorer: Scorer,
    settings: Predicting,
    folder: Path,
    base: Mapping[str, Any],
    *,
    bf16: bool,
    seconds: float | None = None,
    questions: Sequence[Question] | None = None,
) -> None:
    questions = scorer.task.evaluation if questions is None else questions
    predictions = list(evaluate_posterior(posterior, scorer, questions, settings, bf16=bf16))  # all records, or none
    for draws, prediction, taken in predictions:
        record = {
            **base,
            "draws": draws,
            "label": label_of(base.get("name", base["method"]), draws, posterior),
            "seconds": {"fit": seconds, "predict": round(taken, 1)},
        }
        append_record(folder, record, questions, prediction, settings)


def run_compare(
    model: str | None,
    methods: Mapping[str, Method],
    questions: Questions,
    training: Training,
    settings: Predicting,
    output: Path,
    *,
    overwrite: bool,
    on: Part = "evaluation",
) -> list[dict[str, Any]]:
    """`bayestune compare`: fits and evaluates several methods on one task; table, picture and page in `output`.

    With `training.resume`, methods that have records are not run again, and one that was cut off goes on.
    """
    check_output(output, overwrite=overwrite, resume=training.resume)
    task, loaded = questions.load(), open_model(model)
    check_trainable(task)
    rows = {"evaluation": task.evaluation, "held_out": task.held_out}[on]
    if not rows:
        raise ValueError(f"no rows to evaluate on in {on!r}: name a task that has them, or set --holdout")
    scorer = make_scorer(loaded.model, loaded.tokenizer, task, questions.scoring, questions.max_length)
    prepare_output(output, overwrite=overwrite, resume=training.resume)
    done = {record["method"] for record in read_records(output)}
    for name, method in methods.items():
        if name in done:
            continue
        logger.info("fitting %s on %d rows", name, len(task.train))
        posterior = fit_method(method, loaded, scorer, training, questions, output / name)
        base = {
            "task": task.name,
            "rows": on,
            "model": shown(loaded.name),
            "method": name,
            "name": type(method).__name__,
            "train_rows": len(task.train),
            "scoring": questions.scoring,
            "seed": training.seed,
            "config": {
                "method": asdict(method),  # type: ignore[call-overload]
                "training": asdict(training),
                "questions": {
                    key: value.name if isinstance(value, Path) else value for key, value in asdict(questions).items()
                },
                "predicting": asdict(settings),
            },
        }
        seconds = round(posterior.fitted["seconds"], 1)
        _record_all(posterior, scorer, settings, output, base, bf16=training.bf16, seconds=seconds, questions=rows)
        posterior.model.unload()  # type: ignore[operator]
    write_report(output)
    return read_records(output)


def write_report(folder: Path) -> None:
    """Table, picture and page of a results folder, from its records alone."""
    from bayestune.report.page import write_page
    from bayestune.report.plots import save, summary_figure
    from bayestune.report.table import render_table

    records = read_records(folder)
    (folder / "table.md").write_text(render_table(records, style="markdown") + "\n", encoding="utf-8")
    save(summary_figure(records), folder / "summary.png")
    page = write_page(records, folder, f"{records[0]['task']}, {records[0]['model']}")
    _show(records)
    print(f"report: {page}")  # noqa: T201


def _show(records: Sequence[dict[str, Any]]) -> None:
    from bayestune.report.table import render_table

    print(render_table(records))  # noqa: T201
