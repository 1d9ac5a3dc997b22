"""A model, the task it is asked, and a scorer between them."""

import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch

from bayestune.data import Prompt, Question, Scoring, Task, check_trainable
from bayestune.errors import Refusal
from bayestune.evaluation import (
    Adaptive,
    EvaluationOptions,
    Result,
    evaluate_posterior,
    label_of,
    make_result,
    predict_adaptively,
)
from bayestune.forward import Draws
from bayestune.methods import Method, described
from bayestune.models import LoadedModel, load_default, load_model
from bayestune.posteriors import DETAILS, Posterior, Prediction, count_for
from bayestune.scoring import Scorer, make_scorer, row_logits
from bayestune.session.fit import Fit, details_of
from bayestune.session.task_options import TaskOptions
from bayestune.training import Training

logger = logging.getLogger(__name__)

Dtype = Literal["float32", "bfloat16"]
Part = Literal["evaluation", "held_out"]


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
        """A session of what is loaded already."""
        put = (options.scoring, options.max_length)
        scorer = make_scorer(loaded.model, loaded.tokenizer, task, *put)
        return cls(loaded, task, scorer, options, progress)

    @classmethod
    def open(cls, model: str | None, options: TaskOptions, dtype: Dtype = "float32") -> Self:
        """A session to fit in, on the model of that name; None is the default one."""
        task = options.load()
        check_trainable(task)
        loaded = open_model(model, dtype, num_classes(task, options.scoring))
        return cls.of(loaded, task, options)

    @classmethod
    def of_posterior(
        cls, folder: Path, options: TaskOptions, model: str | None = None, *, labelled: bool = True
    ) -> Self:
        """A session to use a folder's posterior in: prompt, scoring, length and dtype as fitted.

        `options` say which rows, `model` where the base model is if it has moved; with `labelled`
        the user's own rows must have answers.
        """
        details = details_of(folder)
        fitted = details["task"]["prompt"]
        prompt = Prompt(fitted["letter"], fitted["text"], tuple(fitted["labels"]))
        options = replace(options, scoring=details["scoring"], max_length=details["max_length"])
        task = _under(prompt, options.load(labelled=labelled), options.scoring)
        loaded = open_model(model or details["base_model"], details["dtype"], details["classes"])
        return cls.of(loaded, task, options)

    def on(self, task: Task) -> Self:
        """The same session with other rows, put as the session's own are."""
        task = _under(self.task.prompt, task, self.options.scoring)
        return self.of(self.loaded, task, self.options, progress=self.progress)

    def rows(self, part: Part = "evaluation") -> tuple[Question, ...]:
        """The rows of a part to evaluate on; an error if there are none."""
        rows = self.task.evaluation if part == "evaluation" else self.task.held_out
        if not rows:
            raise Refusal(
                f"no rows to evaluate on in {part!r} of {self.task.name}: got none, expected some; "
                "give --evaluation_data or a --task that has them, or set --holdout"
            )
        return rows

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
        here = replace(training, output=output / "checkpoints")
        fitted: Any = method if base is None else replace(method, base=base)  # type: ignore[type-var]
        posterior = fitted.fit(self.loaded.model, self.scorer, here)
        return self.save(posterior, method, training, output)

    def save(self, posterior: Posterior, method: Method, training: Training, output: Path) -> Fit:
        """Saves a posterior with all that a later command needs to use it."""
        settings = described(method)
        dtype = next(self.loaded.model.parameters()).dtype
        details = {
            "method": settings["method"],
            "fields": settings,
            "base_model": self.loaded.name,
            "task": {"name": self.task.name, "prompt": asdict(self.task.prompt)},
            "scoring": self.options.scoring,
            "classes": num_classes(self.task, self.options.scoring),
            "dtype": str(dtype).removeprefix("torch."),
            "max_length": self.options.max_length,
            "training": asdict(training),
            "questions": self.options.recorded(),
            "train_rows": len(self.task.train),
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
        """A fit's records, and the rows beside them, for each number of draws."""
        rows = self.rows(part)
        posterior = fit.posterior.on(self.scorer)
        evaluated = evaluate_posterior(
            posterior, self.scorer, rows, options, bf16=fit.bf16, progress=self.progress
        )
        results = []
        for one in evaluated:
            label = label_of(fit.label, one.draws, posterior, options.shared_prefix)
            facts = {"task": self.task.name, "rows": part, "label": label}
            facts |= fit.facts(self.options)
            results.append(make_result(facts, rows, one, options))
        return results

    def predict(self, fit: Fit, draws: Draws, *, decided: bool = False) -> Prediction:
        """The predictive of the evaluation rows, in the precision of the fit.

        With `decided`, drawing stops for rows whose decision is certain, see `Adaptive`.
        """
        asked = (fit.posterior, self.scorer)
        rows = self.rows()
        draws = replace(draws, bf16=fit.bf16)
        if decided:
            rule = Adaptive(draws.count)
            return predict_adaptively(*asked, rows, rule, draws=draws, progress=self.progress)
        draws = replace(draws, count=count_for(fit.posterior, draws.count))
        title = f"predict, {draws.count} draws" if self.progress else None
        logits = row_logits(*asked, self.scorer.encode(rows), draws, progress=title)
        return Prediction.of(logits, exact=fit.posterior.atoms is not None)


def open_model(
    name: str | None, dtype: Dtype = "float32", num_labels: int | None = None
) -> LoadedModel:
    """Loads a model, without a name the default one, onto the accelerator if there is one."""
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "num_labels": num_labels}
    loaded = load_default(**options) if name is None else load_model(name, **options)
    if torch.accelerator.is_available():
        loaded.model.to(torch.accelerator.current_accelerator())  # type: ignore[arg-type]
    return loaded


def num_classes(task: Task, scoring: Scoring) -> int | None:
    """C of the classification head that a task asks for; None for a language model."""
    return len((*task.train, *task.evaluation)[0].options) if scoring == "head" else None


def _under(prompt: Prompt, task: Task, scoring: Scoring) -> Task:
    """The task under the prompt of a fit, whatever its own is."""
    template = prompt.letter if scoring == "letter" else prompt.text
    lost = sum(bool(row.context) for row in (*task.evaluation, *task.held_out))
    if lost and scoring != "head" and "{context}" not in template:
        said = "%d rows of %s have a context, which the fitted prompt leaves out"
        logger.warning(said, lost, task.name)
    return replace(task, prompt=prompt)
