"""`lm-eval`: tasks of lm-evaluation-harness under a posterior's draws, and their calibration."""

import importlib
import json
import logging
from collections.abc import Iterator
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
_EXTRA = {"lm_eval", "sqlitedict", "evaluate", "sacrebleu", "rouge_score", "sklearn"}
_EXTRA |= {"pytablewriter", "word2number", "more_itertools", "dill"}


def run_harness(o: Namespace) -> None:
    """Runs tasks of the harness; records say how calibrated the multiple-choice ones are."""
    models, tasks = _harness()
    _check(o)
    output = o.output or o.posterior
    check_writable(output)
    opened = LanguageFit.open(o.posterior, o.model, o.bf16)
    posterior = opened.fit.posterior
    count = count_for(posterior, o.draws)
    draws = Draws(0 if posterior.atoms == 1 else count, o.draw_seed, bf16=opened.fit.bf16)
    if o.use_cache is not None:
        o.use_cache.mkdir(parents=True, exist_ok=True)
    lm = models.AveragedLM(
        posterior,
        opened.loaded.tokenizer,
        draws,
        batch_size=o.batch_size,
        cache=o.use_cache,
        progress=o.progress,
    )
    how = {"num_fewshot": o.num_fewshot, "limit": o.limit}
    how["apply_chat_template"] = o.apply_chat_template
    run = tasks.run_tasks(lm, tasks.HarnessOptions(_names(o.tasks), o.include_path, **how))
    print(run.table)
    results = list(_results(run, lm, opened, {**how, "batch_size": o.batch_size}))
    append_results(output, results)
    text = json.dumps(run.summary, indent=1, ensure_ascii=False, default=str)
    (output / SUMMARY).write_text(f"{text}\n", encoding="utf-8")
    if results:
        print(render(evaluation_tables([result.record for result in results])))


def _harness() -> tuple[Any, Any]:
    """The modules that need the extra.

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


def _check(o: Namespace) -> None:
    """Refuses numbers that no run has, and no tasks, before a model is loaded."""
    ranges: dict[str, Range] = {"draws": NUMBER, "draw_seed": NUMBER, "batch_size": COUNT}
    ranges |= {"limit": COUNT, "num_fewshot": NUMBER}
    for name, allowed in ranges.items():
        if o[name] is not None and o[name] not in allowed:
            raise Refusal(f"got --{name} {o[name]}; expected {allowed.said}; correct it")
    if not _names(o.tasks):
        raise Refusal(f"got --tasks {o.tasks!r}; expected names such as arc_easy,piqa; give one")
    if o.include_path is not None and not o.include_path.is_dir():
        raise Refusal(f"got --include_path {o.include_path}; expected a folder; look at the path")


def _names(tasks: str) -> list[str]:
    return [name for name in map(str.strip, tasks.strip("[] ").split(",")) if name]


def _results(run: Any, lm: Any, opened: LanguageFit, how: dict[str, Any]) -> Iterator[Result]:
    """A record for each multiple-choice task and each way in which it compares options."""
    kept = run.choices(lm)
    total = sum(len(rows.questions) for rows in kept.values())
    for task, rows in kept.items():
        if rows.left_out:
            said = "%s: %d rows are not in the record, such as %s"
            logger.warning(said, task, len(rows.left_out), rows.left_out[0])
        if not rows.questions:
            continue
        seconds = lm.seconds * len(rows.questions) / total
        asked = {"task": task, "harness": {**how, **run.version_of(task)}}
        for reading in run.readings(task):
            yield _result(rows, reading, lm.draws, (opened, asked, seconds))


def _result(
    rows: OptionRows, reading: str, draws: Draws, of: tuple[LanguageFit, dict[str, Any], float]
) -> Result:
    opened, asked, seconds = of
    fit = opened.fit
    exact = fit.posterior.atoms is not None
    prediction = Prediction.of(rows.logits(reading), exact=exact)
    facts = fit.facts(TaskOptions())
    facts |= {"task": asked["task"], "rows": "evaluation", "scoring": f"lm-eval {reading}"}
    facts["label"] = label_of(fit.label, draws.count, fit.posterior)
    facts["config"] = {**facts["config"], "questions": asked["harness"]}
    options = EvaluationOptions(draws=(draws.count,), draw_seed=draws.seed)
    evaluated = Evaluated(draws.count, prediction, seconds, draws.count)
    return make_result(facts, rows.questions, evaluated, options)
