"""`fit`, `evaluate`, `predict`, `bayesianise` and `bench`.

A command, here and in the other modules, is a function of its parsed options, `args`.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from tqdm import tqdm

from bayestune.bench import Grid, run_bench
from bayestune.cli.answers import Answers, LineWriter, readable_file, repeated_fields
from bayestune.cli.applying import (
    applied_calibration,
    calibrated_result,
    gate_exit_code,
    predicted_lines,
    shared_lines,
)
from bayestune.cli.options import build, chosen_methods, open_session
from bayestune.cli.output_folder import OutputFolder, check_writable
from bayestune.cli.run_settings import Settings, fit_settings
from bayestune.data import ReadOptions, SortedRows, own_task, prompt_of, read_rows, sort_rows
from bayestune.errors import Refusal
from bayestune.evaluation import Bar, EvaluationOptions, append_results, read_records
from bayestune.methods import MLE, TFB, check_launch
from bayestune.posteriors import (
    DETAILS,
    artefact_folder,
    base_name,
    load_adapter,
    posterior_digest,
)
from bayestune.report import evaluation_tables, render, renewed
from bayestune.runtime import is_first_process
from bayestune.session import (
    CalibratedPredictor,
    Session,
    TaskOptions,
    details_of,
    lines_of_all_rows,
    load_way,
    num_classes,
    open_model,
    read_calibration,
    read_options_of_fit,
    with_classes_of_fit,
)
from bayestune.training import Training

logger = logging.getLogger(__name__)


def fit(args: Namespace) -> None:
    """Fits one method and saves its posterior."""
    output = OutputFolder.of(args)
    methods = chosen_methods([args.method], args)
    check_launch(methods[args.method])
    options = build(TaskOptions, args)
    training = build(Training, args, output=None)
    task = options.load()
    settings: Settings = {"method": args.method}
    settings |= fit_settings(args.model, (options, task, args.dtype), training, methods)
    if output.resume and (output.place / DETAILS).is_file():
        output.finish(output.begin(settings))
        if is_first_process():
            print(f"finished already: posterior in {output.folder}")
        return
    session = open_session(args, options, task)
    session.check(methods.values(), training)
    place = output.begin(settings)
    session.fit(methods[args.method], training, place)
    output.finish(place)
    if is_first_process():
        print(f"posterior in {output.folder}")


def evaluate(args: Namespace) -> int:
    """Evaluates a posterior: accuracy and calibration on labelled questions.

    A calibrated one has one more record, of the predictions and decisions under its calibration.

    Returns:
        The exit code: 1 if a bar of `--gate` does not hold.
    """
    folder = args.output or args.posterior
    check_writable(folder)
    bars = [Bar.of(text) for text in args.gate]
    calibration = None if args.uncalibrated else read_calibration(args.posterior)
    session = Session.of_posterior(args.posterior, build(TaskOptions, args), args.model)
    session = replace(session, progress=args.progress)
    session.check_evaluation("evaluation")
    options = build(EvaluationOptions, args)
    fit = session.load(args.posterior, args.bf16)
    results = session.evaluate(fit, options)
    if calibration is not None:
        results.append(calibrated_result(session, fit, calibration, args.posterior, options))
    if not is_first_process():
        return 0
    append_results(folder, results)
    records = renewed(read_records(folder), folder)
    print(render(evaluation_tables(records)))
    return gate_exit_code(bars, results)


def predict(args: Namespace) -> None:
    """Predicts the user's own rows; each line is written as soon as it is known.

    A row that cannot be put to the model is answered with an `error`.

    Raises:
        Refusal: if no row can be predicted, among other reasons.
    """
    answers = Answers.of(args)
    calibration, way = applied_calibration(args)
    rows = _rows_to_predict(args)
    task = own_task(args.input.stem, (), rows.questions)
    options = TaskOptions(evaluation_data=args.input)
    session = Session.of_posterior(args.posterior, options, args.model, task=task)
    questions = session.rows()
    problems = session.problems(questions)
    if len(problems) == len(questions):
        raise problems[0]
    fit_of_way = load_way(session, artefact_folder(args.posterior), way, args.bf16)
    settings = {
        **way.settings,
        "shared_prefix": args.shared_prefix,
        "decided": args.decided,
        "bf16": args.bf16,
        "the files of --posterior": posterior_digest(args.posterior),
        "the calibration": calibration and calibration.applied(),
    }
    file, num_done = answers.begin(repeated_fields(rows), settings)
    unreadable_done = sum(number < num_done for number in rows.problems)
    questions_left = questions[num_done - unreadable_done :]
    predictor = CalibratedPredictor(session, fit_of_way, way, calibration)
    predicted = shared_lines(questions_left, lambda some: predicted_lines(predictor, some, args))
    lines = lines_of_all_rows(rows, predicted, num_done)
    num_rows = len(questions) + len(rows.problems)
    hidden = not args.progress or file is None
    bar = tqdm(lines, "predict", num_rows, initial=num_done, unit="row", disable=hidden)
    errors = _write_lines(bar, file)
    if len(errors) == num_rows:
        raise Refusal(errors[0])
    answers.finish(file)
    if errors:
        warning = "%d of %d rows could not be put or predicted, see their error"
        logger.warning(warning, len(errors), num_rows - num_done)


def _rows_to_predict(args: Namespace) -> SortedRows:
    """The file's rows, in the order of the posterior's classes, and those that cannot be read."""
    details = details_of(args.posterior)
    reading = replace(
        read_options_of_fit(details),
        options=tuple(args.options),
        answer_is=args.answer_is,
        columns=args.columns,
    )
    with readable_file(args.input) as file:
        return with_classes_of_fit(sort_rows(file, reading), details)


def _write_lines(lines: Iterable[Mapping[str, Any]], file: Path | None) -> list[str]:
    """Writes lines as they come; returns the errors among them."""
    errors = []
    with LineWriter(file) as writer:
        for line in lines:
            writer.write(line)
            if "error" in line:
                errors.append(line["error"])
    return errors


def bayesianise(args: Namespace) -> None:
    """Makes a posterior around any LoRA adapter, without training (TFB)."""
    output = OutputFolder.of(args)
    method = build(TFB, args, base=MLE())
    options = build(TaskOptions, args, data=args.anchor)
    reading = ReadOptions(options.options, answer_is=options.answer_is, columns=options.columns)
    rows = read_rows(args.anchor, reading)[: method.anchors]
    task = own_task(args.anchor.stem, rows, ())
    # a public task is named for its prompt alone
    prompt = prompt_of(options.task) if options.task else task.prompt
    task = replace(task, prompt=options.own_prompt().of(prompt, rows, options.scoring))
    name = args.model or base_name(args.adapter)
    loaded = open_model(name, args.dtype, num_classes(task, options.scoring))
    session = Session.of(loaded, task, options)
    point = load_adapter(loaded.model, args.adapter, session.scorer)
    posterior = method.bayesianise(point, session.scorer, rows, bf16=args.bf16)
    place = output.begin()
    session.save(posterior, method, Training(bf16=args.bf16), place)
    output.finish(place)
    facts = posterior.report.extra
    num_tried = len(facts["search"])
    print(f"posterior in {output.folder}: sigma_q {facts['isotropic_std']:.4g}, {num_tried} tried")


def bench(args: Namespace) -> int:
    """Fits and evaluates a grid of models, tasks, methods and seeds; goes on where it stopped.

    Returns:
        The exit code: 1 if cells failed.
    """
    return run_bench(
        build(Grid, args),
        args.output,
        launcher=args.launcher,
        discard_fits=args.discard_fits,
        only_tasks=args.only_tasks,
        only_methods=args.only_methods,
    )
