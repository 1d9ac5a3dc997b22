"""Runs tasks of lm-evaluation-harness; needs the extra `lm-eval`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lm_eval.api.task import Task  # type: ignore[import-not-found]
from lm_eval.evaluator import simple_evaluate  # type: ignore[import-not-found]
from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]
from lm_eval.utils import make_table  # type: ignore[import-not-found]

from bayestune.errors import Refusal, nearest
from bayestune.evaluation.lm_eval import AveragedLM
from bayestune.evaluation.option_likelihoods import READINGS, OptionRows, option_rows


class _Tasks(TaskManager):
    """The harness's task manager, which remembers the tasks it loaded, by name, in `loaded`."""

    def __init__(self, include_path: Path | None) -> None:
        super().__init__(include_path=None if include_path is None else str(include_path))
        self.loaded: dict[str, Task] = {}

    def load(self, task_list: Any) -> Any:
        """The method that harnesses from 0.4.12 on call."""
        with _refused_in_a_line(task_list):
            return self._noted(super().load(task_list))

    def load_task_or_group(self, task_list: Any = None) -> Any:
        """The method that earlier harnesses call."""
        with _refused_in_a_line(task_list):
            return self._noted(super().load_task_or_group(task_list))

    def _noted(self, tasks: Any) -> Any:
        """Remembers the tasks in a tree of dicts, and returns the tree."""
        branches = [tasks]
        while branches:
            for name, value in branches.pop().items():
                if isinstance(value, Task):
                    self.loaded[name] = value
                elif isinstance(value, dict):
                    branches.append(value)
        return tasks


@contextmanager
def _refused_in_a_line(tasks: Any) -> Iterator[None]:
    """Says in a line why tasks cannot be loaded, which the harness says in many ways."""
    try:
        yield
    except Refusal:
        raise
    except Exception as problem:
        reason = " ".join(f"{type(problem).__name__}: {problem}".split())
        raise Refusal(
            f"the harness cannot load {tasks}: got {reason}; expected a task and its data; look at "
            "its YAML file, or at the connection to the Hub"
        ) from problem


@dataclass(frozen=True)
class HarnessOptions:
    """Which tasks of the harness, and how they are put.

    Args:
        tasks: names of tasks, groups or tags, or YAML files.
        include_path: a folder with tasks of your own.
        num_fewshot: examples before a question, where a task leaves it open.
        limit: at most so many documents of each task.
        apply_chat_template: whether questions are put in the model's chat template.
    """

    tasks: Sequence[str]
    include_path: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    apply_chat_template: bool = False


@dataclass(frozen=True)
class Run:
    """A run of the harness: its results, and the tasks by name."""

    results: dict[str, Any]
    tasks: dict[str, Task] = field(repr=False)

    @property
    def table(self) -> str:
        """The harness's own table."""
        return make_table(self.results)

    @property
    def summary(self) -> dict[str, Any]:
        """The results without samples and without what they say of the machine."""
        names = ("results", "groups", "group_subtasks", "configs", "versions", "n-shot")
        names += ("higher_is_better", "n-samples", "config")
        return {name: self.results[name] for name in names if name in self.results}

    def version_of(self, name: str) -> dict[str, Any]:
        """The harness's version and the task's, and how many examples stood before a question."""
        return {
            "lm_eval": version("lm-eval"),
            "task": self.results["versions"].get(name),
            "num_fewshot": self.results["n-shot"].get(name),
        }

    def choices(self, lm: AveragedLM) -> dict[str, OptionRows]:
        """The rows of each multiple-choice task that was run, under the draws of its model."""
        rows = {}
        for name, samples in self.results["samples"].items():
            task = self.tasks.get(name)
            if task is not None and task.OUTPUT_TYPE == "multiple_choice":
                drawn = {}
                for (task_name, document), likelihoods in lm.drawn.items():
                    if task_name == name:
                        drawn[document] = likelihoods
                rows[name] = option_rows(task, samples, drawn)
        return rows

    def readings(self, name: str) -> list[str]:
        """How a task compares options, by the names of its metrics; by likelihood at least."""
        metrics = {one.partition(",")[0] for one in self.results["results"][name]}
        return [reading for reading in READINGS if reading in metrics] or ["acc"]


def run_tasks(lm: AveragedLM, options: HarnessOptions) -> Run:
    """Runs tasks of the harness.

    Args:
        lm: the model.
        options: which tasks, and how they are put.

    Raises:
        Refusal: if a task is unknown, or cannot be loaded.
    """
    manager = _Tasks(options.include_path)
    for name in options.tasks:
        if name not in manager.all_tasks and not Path(name).is_file():
            near = nearest(name, manager.all_tasks)
            hint = f"did you mean {near!r}?" if near else "see `lm-eval ls tasks`"
            raise Refusal(
                f"got the task {name!r}; expected one of the harness's {len(manager.all_tasks)}, a "
                f"YAML file, or one of --include_path; {hint}"
            )
    results = simple_evaluate(
        lm,
        tasks=list(options.tasks),
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        apply_chat_template=options.apply_chat_template,
        task_manager=manager,
        log_samples=True,
    )
    return Run(results, manager.loaded)
