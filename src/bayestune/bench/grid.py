"""The grid of a benchmark and its cells: what is to be computed, in which order, under which key."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bayestune.data import Task, check_trainable
from bayestune.evaluation import EvaluationOptions
from bayestune.methods import Method, Settings, changed, described, make_method
from bayestune.session import Dtype, TaskOptions, shown
from bayestune.training import Training

# What of `Training` leaves the result as it is.
_ASIDE = ("output", "resume", "progress", "save_steps", "logging_steps")
# What came after the first results: not in a key while it has its default, so that keys made before it still hold.
_LATER = ("group_by_length", "shared_prefix")


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
class Grid:
    """Models × tasks × methods × seeds.

    Args:
        models: names of models; null for the default one.
        tasks: names of tasks, each with what is different for it.
        methods: a free name for each entry and its settings, see `make_method`; null where the name is the method's.
        seeds: of training.
        questions: how questions are put, and how many rows are used; its `task` is not.
        training: of all cells, unless a task or a method changes it; its `seed` is not used.
        predicting: numbers of draws and bounds.
        dtype: of the base model's weights.
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

    def entries(self, task: str) -> dict[str, Settings]:
        """The methods' settings on a task.

        Raises:
            ValueError: if the task changes a method that is not in the grid.
        """
        changes = self.settings(task).methods
        if unknown := sorted(set(changes) - set(self.methods)):
            raise ValueError(
                f"task {task} changes methods that are not in the grid: got {unknown}, "
                f"expected some of {sorted(self.methods)}; correct the names"
            )
        return {
            name: _merged(given or {}, changes.get(name, {}))
            for name, given in self.methods.items()
        }

    def settings(self, task: str) -> TaskSettings:
        """What is different for a task; nothing for one that is only evaluated on."""
        return self.tasks.get(task) or TaskSettings()

    def evaluated(self, task: str) -> tuple[str, ...]:
        """The tasks that a posterior fitted on a task is evaluated on."""
        return self.settings(task).evaluate_on or (task,)

    def load(self, task: str) -> Task:
        """A task's rows, under the grid's name for it."""
        questions = changed(replace(self.questions, task=task), self.settings(task).questions)
        return replace(questions.load(), name=task)

    def load_all(self) -> dict[str, Task]:
        """All tasks that are trained or evaluated on, found good for it.

        Raises:
            ValueError: if a task has no rows for its use.
        """
        names = dict.fromkeys(
            [*self.tasks, *(name for task in self.tasks for name in self.evaluated(task))]
        )
        loaded = {name: self.load(name) for name in names}
        for task in self.tasks:
            check_trainable(loaded[task])
            for name in self.evaluated(task):
                if not loaded[name].evaluation:
                    raise ValueError(
                        f"task {name} has no evaluation rows: got none, expected some; evaluate on others"
                    )
        return loaded


def _merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    def value(key: str) -> Any:
        old, new = settings.get(key), changes[key]
        return _merged(old, new) if isinstance(old, Mapping) and isinstance(new, Mapping) else new

    return {**settings, **{key: value(key) for key in changes}}


@dataclass(frozen=True)
class Cell:
    """One method, fitted on one task with one model and seed, and evaluated.

    Args:
        model: the model's name as it was given.
        task: trained on.
        name: the method's entry.
        method: the method; in `WithTraining` where its entry changes the training.
        training: with the seed.
        questions: scoring and length of the prompts.
        evaluate_on: tasks to evaluate on.
        predicting: numbers of draws and bounds.
        context: a digest of what every fit on this model and task depends on besides method and training.
        key: a readable name and a hash of everything that determines the result.
    """

    model: str | None
    task: str
    name: str
    method: Method
    training: Training
    questions: TaskOptions
    evaluate_on: tuple[str, ...]
    predicting: EvaluationOptions
    dtype: Dtype
    context: str
    key: str

    @property
    def title(self) -> str:
        """How the cell is called in a log line."""
        return f"{self.task}, {self.name}, seed {self.training.seed}"


def cells(grid: Grid, tasks: Mapping[str, Task]) -> list[Cell]:
    """The cells of a grid: for each model the seeds, for each seed the tasks, for each task the methods as given.

    So a run that is cut off has whole tables of the first seeds.

    Args:
        grid: what to run.
        tasks: of `Grid.load_all`.

    Raises:
        ValueError: if settings are wrong, or two cells cannot be told apart by name.
    """
    made = [
        _cell(grid, tasks, model, seed, task, name)
        for model in grid.models
        for seed in grid.seeds
        for task in grid.tasks
        for name in grid.methods
    ]
    slugs = [place(cell.key) for cell in made]
    if twice := sorted({slug for slug in slugs if slugs.count(slug) > 1}):
        raise ValueError(
            f"cells that cannot be told apart: got {twice[:3]} more than once, expected models, tasks, methods and "
            "seeds that differ in letters and digits; rename or remove some"
        )
    return made


def _cell(
    grid: Grid, tasks: Mapping[str, Task], model: str | None, seed: int, task: str, name: str
) -> Cell:
    entries = grid.entries(task)
    method = make_method(entries[name], entries, name=name)
    training = replace(
        changed(grid.training, grid.settings(task).training), seed=seed, progress=False
    )
    questions = changed(replace(grid.questions, task=task), grid.settings(task).questions)
    scoring = (questions.scoring, questions.max_length)
    rows = tasks[task]
    context = digest(
        model_facts(model), grid.dtype, scoring, asdict(rows.prompt), rows.train, rows.held_out
    )
    evaluated = [(tasks[other].prompt, tasks[other].evaluation) for other in grid.evaluated(task)]
    whole = digest(
        context, described(method), lasting(training), lasting(grid.predicting), evaluated
    )
    label = shown(model) if model else "default"
    key = f"{slug(label)}-{slug(task)}-{slug(name)}-{seed}--{whole}"
    return Cell(
        model,
        task,
        name,
        method,
        training,
        questions,
        grid.evaluated(task),
        grid.predicting,
        grid.dtype,
        context,
        key,
    )


def lasting(settings: Training | EvaluationOptions) -> dict[str, Any]:
    """The fields of a training, or of how its posterior is evaluated, that determine the result."""
    given, usual = asdict(settings), asdict(type(settings)())
    unset = {name for name in _LATER if name in given and given[name] == usual[name]}
    return {
        name: value for name, value in given.items() if name not in _ASIDE and name not in unset
    }


def model_facts(model: str | None) -> list[Any]:
    """What tells a model from others: its name; of a directory also its configuration and its weights' sizes."""
    facts: list[Any] = [shown(model) if model else None]
    folder = Path(model or "")
    if model and folder.is_dir():
        facts += [(file.name, file.stat().st_size) for file in sorted(folder.glob("*.safetensors"))]
        config = folder / "config.json"
        facts += [config.read_text(encoding="utf-8")] if config.is_file() else []
    return facts


def digest(*parts: Any) -> str:
    """A short hash of JSON-able things and dataclasses."""
    text = json.dumps(
        parts,
        sort_keys=True,
        default=lambda v: asdict(v) if hasattr(v, "__dataclass_fields__") else str(v),
    )
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def slug(name: str) -> str:
    """A name in letters and digits, for files.

    >>> slug("TFB on MAP")
    'tfb-on-map'
    """
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def place(key: str) -> str:
    """The readable part of a key: which model, task, method and seed, whatever the settings."""
    return key.rpartition("--")[0]
