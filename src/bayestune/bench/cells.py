"""A grid and its cells: what is to be computed, in which order, under which keys."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, product
from pathlib import Path
from typing import Any

from bayestune.bench.keys import digest, lasting, lasting_method, model_facts, readable_part, slug
from bayestune.data import Part, Task, check_trainable
from bayestune.errors import SEED, Refusal
from bayestune.evaluation import EvaluationOptions
from bayestune.methods import METHODS, Method, Settings, changed, described, make_method
from bayestune.session import (
    Dtype,
    TaskOptions,
    name_in_records,
    task_as_fitted,
    warn_of_repeated_rows,
    warn_of_seen_rows,
)
from bayestune.training import Training


@dataclass(frozen=True)
class TaskSettings:
    """What is different for one task of a grid.

    Args:
        training: changes to the grid's training.
        questions: changes to the grid's questions.
        methods: changes to the settings of the grid's methods, by entry.
        evaluate_on: tasks to evaluate on; the task itself if there are none.
    """

    training: dict[str, Any] = field(default_factory=dict)
    questions: dict[str, Any] = field(default_factory=dict)
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    evaluate_on: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One method, fitted on one task with one model and seed, and evaluated; settings resolved."""

    model: str | None
    task: str
    name: str
    method: Method
    training: Training
    questions: TaskOptions
    evaluate_on: tuple[str, ...]
    predicting: EvaluationOptions
    dtype: Dtype
    context: str  # a digest of what any fit on this model and task depends on
    key: str  # a readable name and a digest of all that determines the result
    part: Part

    @property
    def title(self) -> str:
        """What the cell is called in a log line."""
        return f"{self.task}, {self.name}, seed {self.training.seed}"

    @property
    def label(self) -> str:
        """The entry's own name; the method's class where the entry is named by the method's key."""
        own = self.name == described(self.method)["method"]
        return METHODS[self.name].__name__ if own else self.name


@dataclass(frozen=True)
class Grid:
    """Models × tasks × methods × seeds.

    Args:
        models: names of models; null for the default one.
        tasks: names of tasks, each with what is different for it.
        methods: entries by free names, see `make_method`; null where the name is the method's.
        seeds: of training.
        questions: how questions are put, and how many rows are used; its `task` is not used.
        training: of all cells, unless a task or a method changes it; its `seed` is not used.
        predicting: numbers of draws, and the bounds of a pass.
        dtype: of the base model's weights.
        rows_by_seed: whether each seed chooses training, held-out and unlabelled rows of its own;
            evaluation rows stay.
        part: the rows to evaluate on: "held_out" for choosing settings.
        protocol: a file whose sha256 every record carries: what was settled before the run.
    """

    models: tuple[str | None, ...] = (None,)
    tasks: dict[str, TaskSettings | None] = field(default_factory=lambda: {"everyday": None})
    methods: dict[str, dict[str, Any] | None] = field(
        default_factory=lambda: {"mle": None, "blob": None}
    )
    seeds: tuple[int, ...] = (1, 2, 3)
    questions: TaskOptions = field(default_factory=TaskOptions)
    training: Training = field(default_factory=Training)
    predicting: EvaluationOptions = field(default_factory=EvaluationOptions)
    dtype: Dtype = "float32"
    rows_by_seed: bool = False
    part: Part = "evaluation"
    protocol: Path | None = None

    def __post_init__(self) -> None:
        for name in ("models", "tasks", "methods", "seeds"):
            given = list(getattr(self, name))
            if not given or len(set(given)) < len(given):
                raise Refusal(
                    f"Grid.{name}: got {given}, expected one or more, each once; correct them"
                )
        wrong = [seed for seed in self.seeds if seed not in SEED]
        if wrong:
            raise Refusal(f"Grid.seeds: got {wrong}, expected {SEED.said}; correct them")

    def settings(self, task: str) -> TaskSettings:
        """What is different for a task; nothing for one that is only evaluated on."""
        return self.tasks.get(task) or TaskSettings()

    def entries(self, task: str) -> dict[str, Settings]:
        """The settings of each entry of `methods` on a task.

        Raises:
            Refusal: if the task changes a method that is not in the grid.
        """
        changes = self.settings(task).methods
        if unknown := sorted(set(changes) - set(self.methods)):
            expected = f"expected some of {sorted(self.methods)}; correct the names"
            got = f"task {task} changes methods that are not in the grid: got {unknown}"
            raise Refusal(f"{got}, {expected}")
        return {
            name: _merged(settings or {}, changes.get(name, {}))
            for name, settings in self.methods.items()
        }

    def options(self, task: str, seed: int) -> TaskOptions:
        """How a task's questions are put, and which."""
        options = changed(replace(self.questions, task=task), self.settings(task).questions)
        if not self.rows_by_seed:
            return options
        evaluation_seed = options.evaluation_seed
        if evaluation_seed is None:
            evaluation_seed = options.subset_seed
        return replace(options, subset_seed=seed, evaluation_seed=evaluation_seed)

    def evaluated(self, task: str) -> tuple[str, ...]:
        """The tasks that a posterior fitted on a task is evaluated on."""
        return self.settings(task).evaluate_on or (task,)

    def load_all(self) -> dict[int, dict[str, Task]]:
        """All tasks by seed and name.

        Raises:
            Refusal: if one has no rows to train or evaluate on, or rows that cannot be put as those
                of a fit that is evaluated on them.
        """
        if self.rows_by_seed:
            return {seed: self._load(seed) for seed in self.seeds}
        of_all_seeds = self._load(0)
        return dict.fromkeys(self.seeds, of_all_seeds)

    def _load(self, seed: int) -> dict[str, Task]:
        tested = dict.fromkeys(chain.from_iterable(map(self.evaluated, self.tasks)))
        names = dict.fromkeys([*self.tasks, *tested])
        loaded = {name: replace(self.options(name, seed).load(), name=name) for name in names}
        for name in self.tasks:
            check_trainable(loaded[name])
            self._refuse_rows_of_others(name, loaded)
        if empty := [name for name in tested if not loaded[name].part(self.part)]:
            lack = f"task {empty[0]} has no {self.part} rows: got none, expected some"
            raise Refusal(f"{lack}; evaluate on others")
        return loaded

    def _refuse_rows_of_others(self, name: str, loaded: Mapping[str, Task]) -> None:
        """Refuses tasks to evaluate on whose rows cannot be put as those of the fit on `name`."""
        fitted = loaded[name]
        scoring = self.options(name, self.seeds[0]).scoring
        if scoring == "head":
            fitted = fitted.in_class_order()
        warn_of_seen_rows(name, len(fitted.seen), len(fitted.evaluation))
        warn_of_repeated_rows(f"training rows of {name}", fitted.train, evaluated=False)
        for other in self.evaluated(name):
            task_as_fitted(loaded[other], fitted.prompt, scoring, fitted.class_names)

    def cells(self, tasks: Mapping[int, Mapping[str, Task]]) -> list[Cell]:
        """The cells on the tasks of `load_all`, seed by seed, task by task, method by method.

        In this order a run that is cut off has whole tables of the first seeds.

        Args:
            tasks: by seed and name.

        Raises:
            Refusal: if the readable parts of two cells' keys are the same.
        """
        order = product(self.models, self.seeds, self.tasks, self.methods)
        cells = []
        for model, seed, task, name in order:
            cells.append(self._cell(tasks[seed], model, seed, task, name))
        names = [readable_part(cell.key) for cell in cells]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise Refusal(
                f"cells that cannot be told apart: got {twice[:3]} more than once, expected "
                "models, tasks, methods and seeds that differ in letters and digits; rename some"
            )
        return cells

    def _cell(
        self, tasks: Mapping[str, Task], model: str | None, seed: int, task: str, name: str
    ) -> Cell:
        entries = self.entries(task)
        method = make_method(entries[name], entries, name=name)
        training = changed(self.training, self.settings(task).training)
        training = replace(training, seed=seed, progress=False)
        options = self.options(task, seed)
        evaluate_on = self.evaluated(task)
        fitted = tasks[task]
        unlabelled = (fitted.unlabelled,) if fitted.unlabelled else ()
        rows = (fitted.prompt, fitted.train, fitted.held_out, *unlabelled)
        how_put = (options.scoring, options.max_length)
        context = digest(model_facts(model), self.dtype, how_put, *rows)
        # rows of other tasks go under the prompt of the fit
        evaluated = [(fitted.prompt, tasks[other].part(self.part)) for other in evaluate_on]
        settings = (lasting_method(method), lasting(training), lasting(self.predicting))
        of_all = digest(context, *settings, evaluated)
        parts = (name_in_records(model) if model else "default", task, name, str(seed))
        return Cell(
            model=model,
            task=task,
            name=name,
            method=method,
            training=training,
            questions=options,
            evaluate_on=evaluate_on,
            predicting=self.predicting,
            dtype=self.dtype,
            context=context,
            key=f"{'-'.join(map(slug, parts))}--{of_all}",
            part=self.part,
        )


def _merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with changes; in nested mappings, only what the changes name is replaced."""
    merged = {**settings, **changes}
    for key, new in changes.items():
        old = settings.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            merged[key] = _merged(old, new)
    return merged
