"""A model, the task it is asked, and a scorer between them."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from bayestune.data import Part, Question, Task, check_ids, check_trainable
from bayestune.decisions import check_draws
from bayestune.errors import Refusal
from bayestune.evaluation import (
    Adaptive,
    EvaluationOptions,
    Result,
    error_row,
    evaluate_posterior,
    label_of,
    make_result,
    predict_adaptively,
    prediction_rows,
)
from bayestune.forward import Draws
from bayestune.methods import Method, changed, described
from bayestune.models import LoadedModel
from bayestune.posteriors import DETAILS, Posterior, Prediction, count_for
from bayestune.scoring import Scorer, check_lengths, make_scorer, own_classes, row_logits
from bayestune.session.as_fitted import (
    classes_of_fit,
    fingerprints,
    prompt_of_fit,
    read_options_of_fit,
    seen_facts,
    seen_rows,
    task_as_fitted,
    warn_of_repeated_rows,
    warn_of_seen_rows,
)
from bayestune.session.before_fitting import check_answers, check_fits, learnt_rows
from bayestune.session.fit import Fit, details_of
from bayestune.session.opened_model import Dtype, Named, dtype_of, num_classes, open_model
from bayestune.session.row_predictor import lines_or_errors, windows
from bayestune.session.task_options import TaskOptions
from bayestune.training import Training

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """A model, the task it is asked and how, whether to fit a method or to use a posterior."""

    loaded: LoadedModel
    task: Task
    scorer: Scorer
    options: TaskOptions
    progress: bool = True  # whether predictions show progress bars

    @classmethod
    def of(
        cls, loaded: LoadedModel, task: Task, options: TaskOptions, *, progress: bool = True
    ) -> Self:
        """A session of what is loaded already.

        Under a classification head, all rows have their options in one order: that of the head's
        own names where it has these, else that of the first row.
        """
        if options.scoring == "head":
            task = task.in_class_order(own_classes(loaded.model, task))
        return cls._of(loaded, task, options, progress=progress)

    @classmethod
    def _of(
        cls, loaded: LoadedModel, task: Task, options: TaskOptions, *, progress: bool = True
    ) -> Self:
        """A session whose task has its prompt and its order of options already."""
        way = (options.scoring, options.max_length)
        scorer = make_scorer(loaded.model, loaded.tokenizer, task, *way)
        return cls(loaded, task, scorer, options, progress)

    @classmethod
    def open(
        cls,
        model: str | None,
        options: TaskOptions,
        dtype: Dtype = "float32",
        *,
        task: Task | None = None,
    ) -> Self:
        """A session to fit in, on the model of that name; None is the default one.

        `task` is what `options` load, where it is loaded already.
        """
        task = task or options.load()
        check_trainable(task)
        warn_of_seen_rows(task.name, len(task.seen), len(task.evaluation))
        warn_of_repeated_rows("training rows", task.train, evaluated=False)
        loaded = open_model(model, dtype, num_classes(task, options.scoring), to_train=True)
        return cls.of(loaded, task, options)

    @classmethod
    def of_posterior(
        cls,
        folder: Path,
        options: TaskOptions,
        model: str | None = None,
        *,
        labelled: bool = True,
        task: Task | None = None,
    ) -> Self:
        """A session with the prompt, scoring, length and dtype of the fit whose folder it is.

        `options` say which rows; those without options have the fit's. `model` names the base model
        if it has moved. With `labelled` the user's own rows must have answers. `task` is what
        `options` load, where it is loaded already.

        Raises:
            Refusal: if `options` name no rows, or the rows cannot be put as those of the fit.
        """
        details = details_of(folder)
        if not (options.task or options.evaluation_data):
            raise Refusal(
                "no rows to evaluate on: got neither a task nor a file, expected one; give "
                "--evaluation_data, or --task"
            )
        task = task or options.load(labelled=labelled, usual=read_options_of_fit(details))
        session = cls.as_fitted(details, task, options, model)
        rows = session.task.evaluation
        warn_of_seen_rows(task.name, seen_rows(details, rows) or 0, len(rows))
        return session

    @classmethod
    def as_fitted(
        cls, details: Mapping[str, Any], task: Task, options: TaskOptions, model: Named = None
    ) -> Self:
        """A session that puts a task's rows to the base model as a fit's folder says."""
        scoring = details["scoring"]
        options = replace(options, scoring=scoring, max_length=details["max_length"])
        task = task_as_fitted(task, prompt_of_fit(details), scoring, classes_of_fit(details))
        loaded = open_model(model or details["base_model"], details["dtype"], details["classes"])
        return cls._of(loaded, task, options)

    def on(self, task: Task) -> Self:
        """The same session with other rows, put as the session's own are."""
        task = task_as_fitted(task, self.task.prompt, self.options.scoring, self.task.class_names)
        return self._of(self.loaded, task, self.options, progress=self.progress)

    def rows(self, part: Part = "evaluation") -> tuple[Question, ...]:
        """The rows of a part to evaluate on; an error if there are none."""
        rows = self.task.part(part)
        if not rows:
            raise Refusal(
                f"no rows to evaluate on in {part!r} of {self.task.name}: got none, expected some; "
                "give --evaluation_data or a --task that has them, or set --holdout"
            )
        check_ids(rows)
        return rows

    def check(self, methods: Iterable[Method], training: Training) -> None:
        """Refuses now what a fit of one of these methods would refuse after hours of others."""
        check_fits(self.loaded.model, self.scorer, training.lora, methods)

    def check_evaluation(self, part: Part) -> None:
        """Refuses rows that cannot be evaluated on, before the work that leads there."""
        rows = self.rows(part)
        check_answers(rows)
        check_lengths(self.loaded.model, rows, self.quietly().scorer.encode(rows))

    def fit(
        self, method: Method, training: Training, output: Path, *, base: Method | None = None
    ) -> Fit:
        """Fits a method and saves its posterior in `output`, checkpoints in `output/checkpoints`.

        With `training.resume`, a posterior that is there already is loaded instead. A `base` stands
        for the method's own, such as one that takes its fits from a folder.
        """
        if training.resume and (output / DETAILS).is_file():
            return self.load(output)
        logger.info("fitting %s on %d rows", type(method).__name__, len(self.task.train))
        with_output = replace(training, output=output / "checkpoints")
        to_fit: Any = method if base is None else replace(method, base=base)  # type: ignore[type-var]
        posterior = to_fit.fit(self.loaded.model, self.scorer, with_output)
        return self.save(posterior, method, training, output)

    def save(self, posterior: Posterior, method: Method, training: Training, output: Path) -> Fit:
        """Saves a posterior with all that a later command needs to use it."""
        settings = described(method)
        training = changed(training, settings.get("training") or {})
        questions = self.options.recorded()
        questions["options"] = self.options.options or self.task.shared_options
        questions["answer_is"] = self.options.answer_is or self.task.answer_is
        details = {
            "method": settings["method"],
            "fields": settings,
            "base_model": self.loaded.name,
            "task": {"name": self.task.name, "prompt": asdict(self.task.prompt)},
            "scoring": self.options.scoring,
            "classes": num_classes(self.task, self.options.scoring),
            "class_names": self.task.class_names,
            "dtype": dtype_of(self.loaded.model),
            "max_length": self.options.max_length,
            "training": asdict(training),
            "questions": questions,
            "train_rows": len(self.task.train),
            "seen": fingerprints((*self.task.train, *learnt_rows(method, self.scorer, training))),
        }
        fit = Fit.of(posterior, details)
        fit.save(output)
        return fit

    def load(self, folder: Path, bf16: bool | None = None) -> Fit:
        """Loads what `fit` wrote; predictions are as precise as the fit unless `bf16` is given."""
        return Fit.load(self.loaded.model, folder, self.scorer, bf16)

    def evaluate(
        self, fit: Fit, options: EvaluationOptions, part: Part = "evaluation"
    ) -> list[Result]:
        """A fit's record and its rows' lines, for each number of draws."""
        rows = self.rows(part)
        posterior = fit.posterior.on(self.scorer)
        results = []
        for evaluated in evaluate_posterior(
            posterior, self.scorer, rows, options, bf16=fit.bf16, progress=self.progress
        ):
            label = label_of(fit.label, evaluated.draws, posterior, options.shared_prefix)
            facts: dict[str, Any] = {"task": self.task.name, "rows": part, "label": label}
            facts |= fit.facts(self.options) | seen_facts(fit.details, rows)
            results.append(make_result(facts, rows, evaluated, options))
        return results

    def predict(
        self,
        fit: Fit,
        draws: Draws,
        *,
        decided: bool = False,
        rows: Sequence[Question] | None = None,
    ) -> Prediction:
        """The predictive of rows, by default those to evaluate on, in the precision of the fit.

        With `decided`, drawing stops for rows whose decision is certain, see `Adaptive`.
        """
        scorer = self.scorer
        rows = self.rows() if rows is None else rows
        draws = replace(draws, bf16=fit.bf16)
        if decided:
            rule = Adaptive(draws.count)
            return predict_adaptively(
                fit.posterior, scorer, rows, rule, draws=draws, progress=self.progress
            )
        draws = replace(draws, count=count_for(fit.posterior, draws.count))
        title = f"predict, {draws.count} draws" if self.progress else None
        logits = row_logits(fit.posterior, scorer, scorer.encode(rows), draws, progress=title)
        check_draws(logits)
        return Prediction.in_parts(logits, exact=fit.posterior.atoms is not None)

    def quietly(self) -> Self:
        """The same session without progress bars and warnings of shortened rows."""
        return replace(self, scorer=replace(self.scorer, warns=False), progress=False)

    def problems(self, rows: Sequence[Question]) -> list[Refusal]:
        """The refusals of the rows that cannot be put; warns of rows that are shortened."""
        try:
            check_lengths(self.loaded.model, rows, self.scorer.encode(rows))
        except Refusal:
            scorer = self.quietly().scorer
            return [problem for row in rows if (problem := self._problem(scorer, row))]
        return []

    def _problem(self, scorer: Scorer, row: Question) -> Refusal | None:
        try:
            check_lengths(self.loaded.model, [row], scorer.encode([row]))
        except Refusal as problem:
            return problem
        return None

    def answers(
        self, fit: Fit, draws: Draws, rows: Sequence[Question], *, decided: bool = False
    ) -> Iterator[dict[str, Any]]:
        """A line for each row, in order, some at a time; with an `error` if it cannot be put."""
        quiet = self.quietly()

        def to_lines(good: Sequence[Question]) -> list[dict[str, Any]]:
            return prediction_rows(good, quiet.predict(fit, draws, decided=decided, rows=good))

        return self.in_windows(rows, to_lines)

    def in_windows(
        self,
        rows: Sequence[Question],
        to_lines: Callable[[Sequence[Question]], Iterable[dict[str, Any]]],
    ) -> Iterator[dict[str, Any]]:
        """The lines that `to_lines` makes of a window of rows; an `error` if one cannot be put."""
        scorer = self.quietly().scorer
        for window in windows(rows):
            problems = [self._problem(scorer, row) for row in window]
            good = [row for row, problem in zip(window, problems, strict=True) if problem is None]
            lines = iter(lines_or_errors(good, to_lines))
            for row, problem in zip(window, problems, strict=True):
                yield next(lines) if problem is None else error_row(row, problem)
