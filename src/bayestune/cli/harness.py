"""`lm-eval`: tasks of lm-evaluation-harness under a posterior's draws, and their calibration."""

import importlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jsonargparse import Namespace

from bayestune.cli.output_folder import check_writable
from bayestune.errors import COUNT, NUMBER, Range, Refusal
from bayestune.evaluation import (
    Evaluated,
    EvaluationOptions,
    OptionRows,
    Result,
    append_results,
    label_of,
    make_result,
)
from bayestune.forward import Draws
from bayestune.posteriors import Prediction, count_for
from bayestune.report import evaluation_tables, render
from bayestune.session import LanguageFit, TaskOptions

logger = logging.getLogger(__name__)

SUMMARY = "lm-eval.json"
# modules that the extra `lm-eval` brings
_EXTRA = {"lm_eval", "sqlitedict", "evaluate", "sacrebleu", "rouge_score", "sklearn"}
_EXTRA |= {"pytablewriter", "word2number", "more_itertools", "dill"}


@dataclass(frozen=True)
class RecordedTask:
    """A multiple-choice task that the harness has run, of which records are made.

    Args:
        name: of the task.
        rows: its questions with their options' log-likelihoods.
        settings: of the harness, and the task's version.
        seconds: that its rows took.
    """

    name: str
    rows: OptionRows
    settings: dict[str, Any]
    seconds: float


def run_harness(args: Namespace) -> None:
    """Runs tasks of the harness; records say how calibrated the multiple-choice ones are."""
    models, tasks = _harness_modules()
    _check_options(args)
    output = args.output or args.posterior
    check_writable(output)
    opened = LanguageFit.open(args.posterior, args.model, args.bf16)
    posterior = opened.fit.posterior
    count = count_for(posterior, args.draws)
    draws = Draws(0 if posterior.atoms == 1 else count, args.draw_seed, bf16=opened.fit.bf16)
    if args.use_cache is not None:
        args.use_cache.mkdir(parents=True, exist_ok=True)
    lm = models.AveragedLM(
        posterior,
        opened.loaded.tokenizer,
        draws,
        batch_size=args.batch_size,
        cache=args.use_cache,
        progress=args.progress,
    )
    settings = {
        "num_fewshot": args.num_fewshot,
        "limit": args.limit,
        "apply_chat_template": args.apply_chat_template,
    }
    options = tasks.HarnessOptions(_task_names(args.tasks), args.include_path, **settings)
    run = tasks.run_tasks(lm, options)
    print(run.table)
    results = []
    for task in _recorded_tasks(run, lm, {**settings, "batch_size": args.batch_size}):
        for reading in run.readings(task.name):
            results.append(_result(task, reading, opened, lm.draws))
    append_results(output, results)
    text = json.dumps(run.summary, indent=1, ensure_ascii=False, default=str)
    (output / SUMMARY).write_text(f"{text}\n", encoding="utf-8")
    if results:
        print(render(evaluation_tables([result.record for result in results])))


def _harness_modules() -> tuple[Any, Any]:
    """The modules that need the extra: the model for the harness, and its tasks.

    Raises:
        Refusal: if it is not installed.
    """
    try:
        models = importlib.import_module("bayestune.evaluation.lm_eval")
        tasks = importlib.import_module("bayestune.evaluation.harness_tasks")
    except ImportError as problem:
        if (problem.name or "").partition(".")[0] not in _EXTRA:
            raise
        raise Refusal(
            f"got no {problem.name}; expected lm-evaluation-harness; "
            "pip install 'bayestune[lm-eval]'"
        ) from problem
    return models, tasks


def _check_options(args: Namespace) -> None:
    """Refuses numbers that no run can have, and no tasks, before a model is loaded."""
    ranges: dict[str, Range] = {"draws": NUMBER, "draw_seed": NUMBER, "batch_size": COUNT}
    ranges |= {"limit": COUNT, "num_fewshot": NUMBER}
    for name, allowed in ranges.items():
        if args[name] is not None and args[name] not in allowed:
            raise Refusal(f"got --{name} {args[name]}; expected {allowed.said}; correct it")
    if not _task_names(args.tasks):
        raise Refusal(f"got --tasks {args.tasks!r}; expected names such as arc_easy,piqa; give one")
    folder = args.include_path
    if folder is not None and not folder.is_dir():
        raise Refusal(f"got --include_path {folder}; expected a folder; look at the path")


def _task_names(text: str) -> list[str]:
    """The names in what is typed after `--tasks`, in brackets or without."""
    names = [name.strip() for name in text.strip("[] ").split(",")]
    return [name for name in names if name]


def _recorded_tasks(run: Any, lm: Any, settings: dict[str, Any]) -> Iterator[RecordedTask]:
    """The multiple-choice tasks of a run that have rows to record.

    Args:
        run: of `harness_tasks.run_tasks`.
        lm: the model it ran, which knows the options' log-likelihoods.
        settings: of the harness.
    """
    rows_by_task = run.choices(lm)
    total = sum(len(rows.questions) for rows in rows_by_task.values())
    for name, rows in rows_by_task.items():
        if rows.left_out:
            warning = "%s: %d rows are not in the record, such as %s"
            logger.warning(warning, name, len(rows.left_out), rows.left_out[0])
        if rows.questions:
            seconds = lm.seconds * len(rows.questions) / total
            yield RecordedTask(name, rows, {**settings, **run.version_of(name)}, seconds)


def _result(task: RecordedTask, reading: str, opened: LanguageFit, draws: Draws) -> Result:
    """The record of a task, and its rows.

    Args:
        task: that was run.
        reading: how it compares options: "acc", "acc_norm" and the like.
        opened: the posterior.
        draws: that answered.
    """
    fit = opened.fit
    exact = fit.posterior.atoms is not None
    prediction = Prediction.of(task.rows.logits(reading), exact=exact)
    facts = fit.facts(TaskOptions())
    facts |= {"task": task.name, "rows": "evaluation", "scoring": f"lm-eval {reading}"}
    facts["label"] = label_of(fit.label, draws.count, fit.posterior)
    facts["config"] = {**facts["config"], "questions": task.settings}
    options = EvaluationOptions(draws=(draws.count,), draw_seed=draws.seed)
    evaluated = Evaluated(draws.count, prediction, task.seconds, draws.count)
    return make_result(facts, task.rows.questions, evaluated, options)
