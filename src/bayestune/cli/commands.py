"""What the commands do: fit, evaluate, predict, compare, table."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from bayestune.adapters import detach
from bayestune.bench import PLAN, collect
from bayestune.data import TASKS, Prompt, Question, Task, check_trainable, load_rows, own_task
from bayestune.evaluation import (
    Adaptive,
    EvaluationOptions,
    append_record,
    evaluate_posterior,
    label_of,
    predict_adaptively,
    prediction_rows,
    read_records,
)
from bayestune.forward import Draws
from bayestune.jsonl import write_json_lines
from bayestune.methods import TFB, Method, described
from bayestune.posteriors import (
    DETAILS,
    Posterior,
    Prediction,
    base_name,
    count_for,
    load_adapter,
    load_posterior,
)
from bayestune.report import (
    Style,
    grid_tables,
    has_shift,
    render,
    save_figure,
    summary_figure,
    summary_tables,
    write_page,
    write_shift,
)
from bayestune.scoring import Scorer, make_scorer, row_logits
from bayestune.session import (
    Dtype,
    TaskOptions,
    check_output,
    classes_of,
    fit_method,
    open_folder,
    open_model,
    prepare_output,
    prompt_of,
    save_fit,
    scorer_of,
    shown,
)
from bayestune.training import Training

Part = Literal["evaluation", "held_out"]


def run_fit(
    model: str | None,
    method: Method,
    questions: TaskOptions,
    training: Training,
    output: Path,
    *,
    overwrite: bool,
    dtype: Dtype = "float32",
) -> None:
    """`bayestune fit`; with `training.resume` a run that was cut off goes on, and a finished one is left alone."""
    if training.resume and (output / DETAILS).is_file():
        print(f"finished already: posterior in {output}")
        return
    check_output(output, overwrite=overwrite, resume=training.resume)
    task = questions.load()
    check_trainable(task)
    loaded = open_model(model, dtype, classes_of(task, questions.scoring))
    scorer = make_scorer(
        loaded.model, loaded.tokenizer, task, questions.scoring, questions.max_length
    )
    prepare_output(output, overwrite=overwrite, resume=training.resume)
    fit_method(method, loaded, scorer, training, questions, output)
    print(f"posterior in {output}")


def run_evaluate(
    posterior: Path,
    model: str | None,
    questions: TaskOptions,
    settings: EvaluationOptions,
    output: Path | None,
    *,
    bf16: bool,
) -> None:
    """`bayestune evaluate`: appends records to the posterior's folder, or to `output`."""
    details, loaded = open_folder(posterior, model)
    task = questions.load()
    if not task.evaluation:
        raise ValueError(
            "no evaluation rows: give --task with an evaluation split, or --evaluation_data"
        )
    scorer = scorer_of(details, loaded, task)
    opened = load_posterior(loaded.model, posterior, scorer)
    folder = output or posterior
    folder.mkdir(parents=True, exist_ok=True)
    base = {
        "method": details["method"],
        "model": shown(details["base_model"]),
        "train_rows": details["train_rows"],
        "scoring": details["scoring"],
        "seed": details["training"]["seed"],
        "config": {
            "method": details["fields"],
            "training": details["training"],
            "predicting": asdict(settings),
        },
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
    shared_prefix: int | None = None,
    adaptive: Adaptive | None = None,
) -> None:
    """`bayestune predict`: rows in, one JSON object a row out, to a file or to standard output.

    With `adaptive`, its `most` stands for `draws`, and each row says how many it had.
    """
    if output and output.exists() and not overwrite:
        raise FileExistsError(
            f"{output} is there already: choose another --output, or give --overwrite"
        )
    details, loaded = open_folder(posterior, model)
    questions = load_rows(rows, options, labelled=False)
    task = Task(details["task"]["name"], (), questions, prompt=prompt_of(details))
    scorer = scorer_of(details, loaded, task)
    opened = load_posterior(loaded.model, posterior, scorer)
    how: dict[str, Any] = {"seed": draw_seed, "shared_prefix": shared_prefix}
    if adaptive is not None:
        predicted = predict_adaptively(
            opened, scorer, questions, adaptive, bf16=bf16, progress=bool(output), **how
        )
        used = predicted.draws_used.tolist()
        lines = [
            {**r, "draws": n}
            for r, n in zip(prediction_rows(questions, predicted), used, strict=True)
        ]
    else:
        title = f"predict, {draws} draws" if output else None
        which = Draws(count_for(opened, draws), **how)
        logits = row_logits(
            opened, scorer, scorer.encode(questions), which, bf16=bf16, progress=title
        )
        lines = prediction_rows(questions, Prediction.of(logits))
    if output:
        write_json_lines(output, lines)
    else:
        print("\n".join(json.dumps(line, ensure_ascii=False) for line in lines))


def _record_all(
    posterior: Posterior,
    scorer: Scorer,
    settings: EvaluationOptions,
    folder: Path,
    base: Mapping[str, Any],
    *,
    bf16: bool,
    seconds: float | None = None,
    questions: Sequence[Question] | None = None,
) -> None:
    questions = scorer.task.evaluation if questions is None else questions
    predictions = list(
        evaluate_posterior(posterior, scorer, questions, settings, bf16=bf16)
    )  # all records, or none
    for draws, prediction, taken in predictions:
        record = {
            **base,
            "draws": draws,
            "label": label_of(
                base.get("name", base["method"]), draws, posterior, settings.shared_prefix
            ),
            "seconds": {"fit": seconds, "predict": round(taken, 1)},
        }
        append_record(folder, record, questions, prediction, settings)


def run_compare(
    model: str | None,
    methods: Mapping[str, Method],
    questions: TaskOptions,
    training: Training,
    settings: EvaluationOptions,
    output: Path,
    *,
    overwrite: bool,
    on: Part = "evaluation",
    dtype: Dtype = "float32",
) -> list[dict[str, Any]]:
    """`bayestune compare`: fits and evaluates several methods on one task; table, picture and page in `output`.

    With `training.resume`, methods that have records are not run again, and one that was cut off goes on.
    """
    check_output(output, overwrite=overwrite, resume=training.resume)
    task = questions.load()
    check_trainable(task)
    loaded = open_model(model, dtype, classes_of(task, questions.scoring))
    rows = {"evaluation": task.evaluation, "held_out": task.held_out}[on]
    if not rows:
        raise ValueError(
            f"no rows to evaluate on in {on!r}: name a task that has them, or set --holdout"
        )
    scorer = make_scorer(
        loaded.model, loaded.tokenizer, task, questions.scoring, questions.max_length
    )
    prepare_output(output, overwrite=overwrite, resume=training.resume)
    done = {record["method"] for record in read_records(output)}
    for name, method in methods.items():
        if name in done:
            continue
        posterior = fit_method(method, loaded, scorer, training, questions, output / name)
        base = _facts(name, method, loaded.name, task, questions, training, settings, dtype) | {
            "rows": on
        }
        seconds = round(posterior.report.seconds, 1)
        _record_all(
            posterior,
            scorer,
            settings,
            output,
            base,
            bf16=training.bf16,
            seconds=seconds,
            questions=rows,
        )
        detach(posterior.model)
    write_report(output)
    return read_records(output)


def _facts(
    name: str,
    method: Method,
    model: str,
    task: Task,
    questions: TaskOptions,
    training: Training,
    settings: EvaluationOptions,
    dtype: Dtype,
) -> dict[str, Any]:
    """What a record says of how it came about."""
    asked = {
        key: value.name if isinstance(value, Path) else value
        for key, value in asdict(questions).items()
    }
    return {
        "task": task.name,
        "model": shown(model),
        "method": name,
        "name": type(method).__name__,
        "train_rows": len(task.train),
        "scoring": questions.scoring,
        "seed": training.seed,
        "config": {
            "method": described(method),
            "training": asdict(training),
            "questions": asked,
            "predicting": asdict(settings),
            "dtype": dtype,
        },
    }


def run_bayesianise(
    adapter: Path,
    model: str | None,
    anchor: Path,
    method: TFB,
    questions: TaskOptions,
    output: Path,
    *,
    overwrite: bool,
    bf16: bool = False,
    dtype: Dtype = "float32",
) -> None:
    """`bayestune bayesianise`: a posterior around any LoRA adapter, without training."""
    check_output(output, overwrite=overwrite)
    rows = load_rows(anchor, questions.options)[: method.anchors]
    task = replace(own_task(anchor.stem, rows, ()), prompt=_prompt(questions, rows))
    loaded = open_model(model or base_name(adapter), dtype, classes_of(task, questions.scoring))
    scorer = make_scorer(
        loaded.model, loaded.tokenizer, task, questions.scoring, questions.max_length
    )
    posterior = method.bayesianise(
        load_adapter(loaded.model, adapter, scorer), scorer, rows, bf16=bf16
    )
    prepare_output(output, overwrite=overwrite)
    save_fit(posterior, method, loaded, scorer, Training(bf16=bf16), questions, output)
    report = posterior.report.extra
    print(
        f"posterior in {output}: sigma_q {report['isotropic_std']:.4g}, {len(report['search'])} tried"
    )


def _prompt(questions: TaskOptions, rows: Sequence[Question]) -> Prompt:
    """The templates of the named task; of one's own rows where it is the default."""
    known = TASKS.get(questions.task) if questions.task != TaskOptions.task else None
    return known.prompt if known else own_task("own", rows, ()).prompt


def write_report(folder: Path) -> None:
    """Table, picture and page of a results folder, from its records alone."""
    records = read_records(folder)
    (folder / "table.md").write_text(
        render(summary_tables(records), "markdown") + "\n", encoding="utf-8"
    )
    save_figure(summary_figure(records), folder / "summary.png")
    page = write_page(records, folder, f"{records[0]['task']}, {records[0]['model']}")
    _show(records)
    print(f"report: {page}")


def _show(records: Sequence[dict[str, Any]]) -> None:
    print(render(summary_tables(records)))


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
        style: "text", "markdown" or "latex".
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
        raise FileNotFoundError(
            f"no records in {results}: expected a folder of `bench` or `compare`; run one first"
        )
    if has_shift(records):
        write_shift(records, results)
    table = render(grid_tables(records, results, resamples, against), style)
    if output is None:
        print(table)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(table + "\n", encoding="utf-8")
    return table
