"""What the commands do, each a few lines over a session."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from jsonargparse import Namespace

from bayestune.adapters import detach
from bayestune.bench import PLAN, Grid, collect, run_bench
from bayestune.cli.options import Output, built, chosen_methods
from bayestune.data import TASKS, load_rows, own_task
from bayestune.evaluation import EvaluationOptions, append_results, prediction_rows, read_records
from bayestune.forward import Draws
from bayestune.jsonl import write_json_lines
from bayestune.methods import MLE, TFB, Method
from bayestune.posteriors import DETAILS, base_name, load_adapter
from bayestune.report import (
    grid_tables,
    has_shift,
    render,
    renewed,
    save_figure,
    summary_figure,
    summary_tables,
    write_page,
    write_shift,
)
from bayestune.session import Part, Session, TaskOptions, num_classes, open_model
from bayestune.training import Training


def fit(o: Namespace) -> None:
    """Fit one method and save its posterior."""
    if o.resume and (o.output / DETAILS).is_file():
        print(f"finished already: posterior in {o.output}")
        return
    output = Output.of(o)
    methods = chosen_methods([o.method], o)
    session = Session.open(o.model, built(TaskOptions, o), o.dtype)
    output.prepare()
    session.fit(methods[o.method], built(Training, o, output=None), output.folder)
    print(f"posterior in {output.folder}")


def evaluate(o: Namespace) -> None:
    """Accuracy and calibration of a posterior on labelled questions."""
    session = Session.of_posterior(o.posterior, built(TaskOptions, o), o.model)
    results = session.evaluate(session.load(o.posterior, o.bf16), built(EvaluationOptions, o))
    folder = o.output or o.posterior
    append_results(folder, results)
    print(render(summary_tables(renewed(read_records(folder), folder))))


def predict(o: Namespace) -> None:
    """Probabilities and uncertainty for your own rows: JSON lines in, JSON lines out."""
    if o.output and o.output.exists() and not o.overwrite:
        said = f"{o.output} is there already: choose another --output, or give --overwrite"
        raise FileExistsError(said)
    options = TaskOptions(evaluation_data=o.input, options=tuple(o.options))
    session = Session.of_posterior(o.posterior, options, o.model, labelled=False)
    session = replace(session, progress=o.output is not None)
    draws = Draws(o.draws, o.draw_seed, shared_prefix=o.shared_prefix)
    fitted = session.load(o.posterior, o.bf16)
    lines = prediction_rows(session.rows(), session.predict(fitted, draws, decided=o.decided))
    if o.output:
        write_json_lines(o.output, lines)
    else:
        print("\n".join(json.dumps(line, ensure_ascii=False) for line in lines))


def bayesianise(o: Namespace) -> None:
    """A posterior around any LoRA adapter, without training (TFB)."""
    output = Output.of(o)
    method = built(TFB, o, base=MLE())
    options = built(TaskOptions, o, data=o.anchor)
    rows = load_rows(o.anchor, options.options)[: method.anchors]
    task = own_task(o.anchor.stem, rows, ())
    if options.task in TASKS and options.task != TaskOptions.task:  # a task named for its prompt
        task = replace(task, prompt=TASKS[options.task].prompt)
    name = o.model or base_name(o.adapter)
    loaded = open_model(name, o.dtype, num_classes(task, options.scoring))
    session = Session.of(loaded, task, options)
    point = load_adapter(loaded.model, o.adapter, session.scorer)
    posterior = method.bayesianise(point, session.scorer, rows, bf16=o.bf16)
    output.prepare()
    session.save(posterior, method, Training(bf16=o.bf16), output.folder)
    found = posterior.report.extra
    tried = len(found["search"])
    print(f"posterior in {output.folder}: sigma_q {found['isotropic_std']:.4g}, {tried} tried")


def compare(o: Namespace) -> None:
    """Fit and evaluate several methods on one task: table, picture, page."""
    output = Output.of(o)
    methods = chosen_methods(o.methods, o)
    session = Session.open(o.model, built(TaskOptions, o), o.dtype)
    training = built(Training, o, output=None)
    compare_methods(session, methods, training, built(EvaluationOptions, o), output, o.on)


def compare_methods(
    session: Session,
    methods: Mapping[str, Method],
    training: Training,
    options: EvaluationOptions,
    output: Output,
    part: Part = "evaluation",
) -> None:
    """Fits and evaluates methods, each in a folder of its name, and writes the report.

    A resumed run skips methods that have records, and goes on with one that was cut off.
    """
    session.rows(part)  # refuses a part without rows before anything is written
    output.prepare()
    done = {record["method"] for record in read_records(output.folder)}
    for name, method in methods.items():
        if name not in done:
            fitted = session.fit(method, training, output.folder / name)
            append_results(output.folder, session.evaluate(fitted, options, part))
            detach(fitted.posterior.model)
    write_report(output.folder)


def write_report(folder: Path) -> None:
    """Table, picture and page of a results folder, from its records alone."""
    records = renewed(read_records(folder), folder)
    table = render(summary_tables(records), "markdown")
    (folder / "table.md").write_text(f"{table}\n", encoding="utf-8")
    save_figure(summary_figure(records), folder / "summary.png")
    page = write_page(records, folder, f"{records[0]['task']}, {records[0]['model']}")
    print(render(summary_tables(records)))
    print(f"report: {page}")


def bench(o: Namespace) -> int:
    """Fit and evaluate a grid of models, tasks, methods and seeds; goes on where it stopped."""
    only = {"only_tasks": o.only_tasks, "only_methods": o.only_methods}
    grid = built(Grid, o)
    return run_bench(grid, o.output, launcher=o.launcher, discard_fits=o.discard_fits, **only)


def table(o: Namespace) -> None:
    """The table of a results folder: methods × tasks, mean ± std over seeds, significance.

    If a method trained on OpenBookQA was also evaluated on other tasks, it writes `shift.md` and
    `risk_coverage.png` into the folder as well.
    """
    records = collect(o.results) if (o.results / PLAN).is_file() else read_records(o.results)
    if not records:
        raise FileNotFoundError(
            f"no records in {o.results}: expected a folder of `bench` or `compare`; run one first"
        )
    if has_shift(records):
        write_shift(records, o.results)
    text = render(grid_tables(records, o.results, o.resamples, o.against), o.style)
    if o.output is None:
        print(text)
    else:
        o.output.parent.mkdir(parents=True, exist_ok=True)
        o.output.write_text(f"{text}\n", encoding="utf-8")
