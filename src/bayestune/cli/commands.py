"""What the commands do, each a few lines over a session."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from tqdm import tqdm

from bayestune.adapters import detach
from bayestune.bench import PLAN, Grid, collect, run_bench
from bayestune.cli.answers import Answers, LineWriter, readable, repeated
from bayestune.cli.applying import answered, calibrated_result, chosen_way, in_shares, passed
from bayestune.cli.options import built, chosen_methods
from bayestune.cli.output_folder import OutputFolder, check_writable
from bayestune.cli.reporting import write_report
from bayestune.cli.run_settings import evaluation_settings, fit_settings
from bayestune.data import (
    Part,
    ReadOptions,
    SortedRows,
    Task,
    own_task,
    prompt_of,
    read_rows,
    sort_rows,
)
from bayestune.errors import Refusal
from bayestune.evaluation import RECORDS, Bar, EvaluationOptions, append_results, read_records
from bayestune.methods import MLE, TFB, Method, check_launch
from bayestune.posteriors import (
    DETAILS,
    artefact_folder,
    base_name,
    load_adapter,
    posterior_digest,
)
from bayestune.report import (
    evaluation_tables,
    grid_tables,
    has_shift,
    render,
    renewed,
    write_shift,
)
from bayestune.runtime import is_first_process
from bayestune.session import (
    CalibratedPredictor,
    LoadedBase,
    Session,
    TaskOptions,
    details_of,
    in_order,
    load_way,
    num_classes,
    of_its_classes,
    open_model,
    read_calibration,
    usual_reading,
)
from bayestune.training import Training

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """Where a comparison writes, what it was started with, and on which rows it evaluates."""

    output: OutputFolder
    settings: dict[str, Any] = field(default_factory=dict)
    part: Part = "evaluation"
    labels: Mapping[str, str] = field(default_factory=dict)  # of methods, in the table
    command: str = ""  # the command line, for the page


def fit(o: Namespace) -> None:
    """Fits one method and saves its posterior."""
    output = OutputFolder.of(o)
    methods = chosen_methods([o.method], o)
    check_launch(methods[o.method])
    options = built(TaskOptions, o)
    training = built(Training, o, output=None)
    task = options.load()
    settings = {"method": o.method}
    settings |= fit_settings(o.model, (options, task, o.dtype), training, methods)
    if output.resume and (output.place / DETAILS).is_file():
        output.finish(output.begin(settings))
        if is_first_process():
            print(f"finished already: posterior in {output.folder}")
        return
    session = _opened(o, options, task)
    session.check(methods.values(), training)
    place = output.begin(settings)
    session.fit(methods[o.method], training, place)
    output.finish(place)
    if is_first_process():
        print(f"posterior in {output.folder}")


def _opened(o: Namespace, options: TaskOptions, task: Task) -> Session:
    """The session to fit in, with or without progress bars."""
    session = Session.open(o.model, options, o.dtype, task=task)
    return replace(session, progress=o.progress)


def evaluate(o: Namespace) -> int:
    """Evaluates a posterior: accuracy and calibration on labelled questions.

    A calibrated one has a record more: of what its calibration says to do.
    """
    folder = o.output or o.posterior
    check_writable(folder)
    bars = [Bar.of(text) for text in o.gate]
    calibration = None if o.uncalibrated else read_calibration(o.posterior)
    session = Session.of_posterior(o.posterior, built(TaskOptions, o), o.model)
    session = replace(session, progress=o.progress)
    session.check_evaluation("evaluation")
    options = built(EvaluationOptions, o)
    fit = session.load(o.posterior, o.bf16)
    results = session.evaluate(fit, options)
    if calibration is not None:
        results.append(calibrated_result(session, fit, calibration, o.posterior, options))
    if not is_first_process():
        return 0
    append_results(folder, results)
    records = renewed(read_records(folder), folder)
    print(render(evaluation_tables(records)))
    return passed(bars, results)


def predict(o: Namespace) -> None:
    """Predicts the user's own rows: JSON lines in, JSON lines out, each as soon as it is known.

    A row that cannot be put to the model is answered with an `error`.
    """
    answers = Answers.of(o)
    calibration, way = chosen_way(o)
    rows = _rows_to_predict(o)
    task = own_task(o.input.stem, (), rows.questions)
    options = TaskOptions(evaluation_data=o.input)
    session = Session.of_posterior(o.posterior, options, o.model, task=task)
    questions = session.rows()
    problems = session.problems(questions)
    if len(problems) == len(questions):
        raise problems[0]
    fitted = load_way(session, artefact_folder(o.posterior), way, o.bf16)
    settings = {
        **way.settings,
        "shared_prefix": o.shared_prefix,
        "decided": o.decided,
        "bf16": o.bf16,
        "the files of --posterior": posterior_digest(o.posterior),
        "the calibration": calibration and calibration.applied(),
    }
    place, done = answers.begin(repeated(rows), settings)
    left = questions[done - sum(number < done for number in rows.problems) :]
    predictor = CalibratedPredictor(session, fitted, way, calibration)
    lines = in_order(rows, in_shares(left, lambda some: answered(predictor, some, o)), done)
    count = len(questions) + len(rows.problems)
    hidden = not o.progress or place is None
    bar = tqdm(lines, "predict", count, initial=done, unit="row", disable=hidden)
    bad = _write(bar, place)
    if len(bad) == count:
        raise Refusal(bad[0])
    answers.finish(place)
    if bad:
        said = "%d of %d rows could not be put or predicted, see their error"
        logger.warning(said, len(bad), count - done)


def _write(lines: Iterable[Mapping[str, Any]], place: Path | None) -> list[str]:
    """Writes lines as they come; returns the errors among them."""
    errors = []
    with LineWriter(place) as writer:
        for line in lines:
            writer.write(line)
            if "error" in line:
                errors.append(line["error"])
    return errors


def _rows_to_predict(o: Namespace) -> SortedRows:
    """The file's rows, in the order of the posterior's classes, and those that cannot be read."""
    details = details_of(o.posterior)
    own = {"options": tuple(o.options), "answer_is": o.answer_is, "columns": o.columns}
    with readable(o.input) as file:
        return of_its_classes(sort_rows(file, replace(usual_reading(details), **own)), details)


def bayesianise(o: Namespace) -> None:
    """A posterior around any LoRA adapter, without training (TFB)."""
    output = OutputFolder.of(o)
    method = built(TFB, o, base=MLE())
    options = built(TaskOptions, o, data=o.anchor)
    reading = ReadOptions(options.options, answer_is=options.answer_is, columns=options.columns)
    rows = read_rows(o.anchor, reading)[: method.anchors]
    task = own_task(o.anchor.stem, rows, ())
    prompt = prompt_of(options.task) if options.task else task.prompt  # named for its prompt
    task = replace(task, prompt=options.own_prompt().of(prompt, rows, options.scoring))
    name = o.model or base_name(o.adapter)
    loaded = open_model(name, o.dtype, num_classes(task, options.scoring))
    session = Session.of(loaded, task, options)
    point = load_adapter(loaded.model, o.adapter, session.scorer)
    posterior = method.bayesianise(point, session.scorer, rows, bf16=o.bf16)
    place = output.begin()
    session.save(posterior, method, Training(bf16=o.bf16), place)
    output.finish(place)
    found = posterior.report.extra
    tried = len(found["search"])
    print(f"posterior in {output.folder}: sigma_q {found['isotropic_std']:.4g}, {tried} tried")


def compare(o: Namespace) -> None:
    """Fits and evaluates several methods on one task: table, picture, page."""
    output = OutputFolder.of(o)
    methods = chosen_methods(o.methods, o)
    options = built(TaskOptions, o)
    training = built(Training, o, output=None)
    predicting = built(EvaluationOptions, o)
    task = options.load()
    session = _opened(o, options, task)
    settings = fit_settings(o.model, (options, task, o.dtype), training, methods)
    settings |= evaluation_settings(session.rows(o.on), predicting)
    run = Run(output, settings, o.on, command=o.command_line)
    compare_methods(session, methods, training, predicting, run)


def compare_methods(
    session: Session,
    methods: Mapping[str, Method],
    training: Training,
    options: EvaluationOptions,
    run: Run,
) -> None:
    """Fits and evaluates methods, each in a folder of its name, and writes the report.

    A method whose base is one of the others takes its fit. A resumed run skips methods that have
    records, and goes on with one that was cut off.
    """
    session.check_evaluation(run.part)
    session.check(methods.values(), training)
    place = run.output.begin(run.settings)
    done = {record["method"] for record in read_records(place)}
    for name, method in methods.items():
        if name not in done:
            base = _base_of(method, methods, LoadedBase(session, place, training=training))
            fitted = session.fit(method, training, place / name, base=base)
            fitted = replace(fitted, label=run.labels.get(name, fitted.label))
            results = session.evaluate(fitted, options, run.part)
            if is_first_process():
                append_results(place, results)
            detach(fitted.posterior.model)
    run.output.finish(place)
    if is_first_process():
        write_report(run.output.folder, run.command)


def _base_of(method: Any, methods: Mapping[str, Method], fitted: LoadedBase) -> Method | None:
    """A method's base as it was fitted before, in a folder of its name; None if it was not."""
    own = getattr(method, "base", None)
    for name, other in methods.items():
        if own == other and (fitted.folder / name / DETAILS).is_file():
            return replace(fitted, folder=fitted.folder / name, method=own)
    return None


def bench(o: Namespace) -> int:
    """Fits and evaluates a grid of models, tasks, methods and seeds; goes on where it stopped."""
    only = {"only_tasks": o.only_tasks, "only_methods": o.only_methods}
    grid = built(Grid, o)
    return run_bench(grid, o.output, launcher=o.launcher, discard_fits=o.discard_fits, **only)


def table(o: Namespace) -> None:
    """The table of a results folder: methods × tasks, mean ± std over seeds, significance.

    If a method trained on OpenBookQA was also evaluated on other tasks, it writes `shift.md` and
    `risk_coverage.png` into the folder as well.
    """
    if o.output and o.output.exists() and o.output.name in (RECORDS, PLAN):
        raise Refusal(f"--output {o.output} has the records themselves: choose another file")
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
