"""`compare`: several methods on one task, each fitted and evaluated, with a report."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jsonargparse import Namespace

from bayestune.adapters import detach
from bayestune.cli.options import build, chosen_methods, open_session
from bayestune.cli.output_folder import OutputFolder
from bayestune.cli.reporting import write_report
from bayestune.cli.run_settings import Settings, evaluation_settings, fit_settings
from bayestune.data import Part
from bayestune.evaluation import EvaluationOptions, append_results, read_records
from bayestune.methods import Method
from bayestune.posteriors import DETAILS
from bayestune.runtime import is_first_process
from bayestune.session import LoadedBase, Session, TaskOptions
from bayestune.training import Training


@dataclass(frozen=True)
class Run:
    """A run of `compare_methods`, beside what it fits.

    Args:
        output: where it writes.
        settings: what it was started with, for `--resume`.
        part: the rows it evaluates on.
        labels: what methods are called in the table, by name; those left out by their own label.
        command: the command line, for the page.
    """

    output: OutputFolder
    settings: Settings = field(default_factory=dict)
    part: Part = "evaluation"
    labels: Mapping[str, str] = field(default_factory=dict)
    command: str = ""


def compare(args: Namespace) -> None:
    """Fits and evaluates several methods on one task, and writes a table, a picture and a page."""
    output = OutputFolder.of(args)
    methods = chosen_methods(args.methods, args)
    options = build(TaskOptions, args)
    training = build(Training, args, output=None)
    evaluation_options = build(EvaluationOptions, args)
    task = options.load()
    session = open_session(args, options, task)
    settings = fit_settings(args.model, (options, task, args.dtype), training, methods)
    settings |= evaluation_settings(session.rows(args.on), evaluation_options)
    run = Run(output, settings, args.on, command=args.command_line)
    compare_methods(session, methods, training, evaluation_options, run)


def compare_methods(
    session: Session,
    methods: Mapping[str, Method],
    training: Training,
    options: EvaluationOptions,
    run: Run,
) -> None:
    """Fits and evaluates methods, each in a folder of its name, and writes the report.

    A method whose base is one of the others loads that one's fit. A resumed run skips methods that
    have records, and goes on with one that was cut off.

    Args:
        session: the model and the task.
        methods: by the names of their folders, a base before those that build on it.
        training: of each fit.
        options: of each evaluation.
        run: where it writes, and on which rows it evaluates.
    """
    session.check_evaluation(run.part)
    session.check(methods.values(), training)
    place = run.output.begin(run.settings)
    done = {record["method"] for record in read_records(place)}
    for name, method in methods.items():
        if name in done:
            continue
        base = _fitted_base(method, methods, LoadedBase(session, place, training=training))
        fitted = session.fit(method, training, place / name, base=base)
        fitted = replace(fitted, label=run.labels.get(name, fitted.label))
        results = session.evaluate(fitted, options, run.part)
        if is_first_process():
            append_results(place, results)
        detach(fitted.posterior.model)
    run.output.finish(place)
    if is_first_process():
        write_report(run.output.folder, run.command)


def _fitted_base(method: Any, methods: Mapping[str, Method], run: LoadedBase) -> Method | None:
    """A method's base as this run fitted it before, to be loaded; None if it did not.

    Args:
        method: perhaps with a base.
        methods: of the run, by the names of their folders.
        run: the run's session, folder and training.
    """
    base = getattr(method, "base", None)
    for name, other in methods.items():
        folder = run.folder / name
        if base == other and (folder / DETAILS).is_file():
            return replace(run, folder=folder, method=base)
    return None
