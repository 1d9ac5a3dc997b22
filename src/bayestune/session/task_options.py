"""Which questions a session is about, and how they are put."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bayestune.data import Scoring, Task, load_rows, load_task, own_task

# What a fit settles, whichever rows its posterior is evaluated on.
OF_THE_FIT = ("data", "scoring", "max_length", "holdout", "train_rows", "unlabelled_rows")


@dataclass(frozen=True)
class TaskOptions:
    """Which questions, and how they are put.

    Args:
        task: a task of the table; your own rows (`data`, `evaluation_data`) go before it.
        data_root: a directory in the Hub's layout; None for the Hub.
        data: your own training rows, a JSONL or CSV file.
        evaluation_data: your own evaluation rows.
        options: the options of every row of your files that has none of its own.
        scoring: "letter" compares the answer tokens' logits, "text" the likelihoods of the options'
            texts.
        max_length: tokens of a prompt.
        holdout: the part of train held out for choosing anything.
        train_rows: use at most so many training rows.
        evaluation_rows: use at most so many evaluation rows.
        subset_seed: of the choice of rows.
        evaluation_seed: of the choice of evaluation rows, where not `subset_seed`.
        unlabelled_data: your own rows without answers, for `distilled` to learn on.
        unlabelled_rows: so many further rows of train lose their answers for that.
    """

    task: str = "everyday"
    data_root: Path | None = None
    data: Path | None = None
    evaluation_data: Path | None = None
    options: tuple[str, ...] = ()
    scoring: Scoring = "letter"
    max_length: int = 300
    holdout: float = 0.0
    train_rows: int | None = None
    evaluation_rows: int | None = None
    subset_seed: int = 0
    evaluation_seed: int | None = None
    unlabelled_data: Path | None = None
    unlabelled_rows: int = 0

    def load(self, *, labelled: bool = True) -> Task:
        """The task with its rows chosen; `evaluation_data` may lack answers if not `labelled`."""
        train = load_rows(self.data, self.options) if self.data else ()
        file = self.evaluation_data
        test = load_rows(file, self.options, labelled=labelled) if file else ()
        if train or test:
            task = own_task(Path(self.data or file or "").stem, train, test)
        else:
            task = load_task(self.task, self.data_root)
        if self.unlabelled_data:
            spare = load_rows(self.unlabelled_data, self.options, labelled=False)
            task = replace(task, unlabelled=tuple(replace(row, answer=None) for row in spare))
        fixed = self.evaluation_seed
        seed = self.subset_seed
        test = task.subset(evaluation=self.evaluation_rows, seed=seed if fixed is None else fixed)
        chosen = task.subset(self.train_rows, None, self.holdout, seed, self.unlabelled_rows)
        return replace(chosen, evaluation=test.evaluation)

    def recorded(self, fitted: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The options as records keep them: files by name, and what a fit settled as fitted."""
        found = {}
        for name, value in asdict(self).items():
            found[name] = value.name if isinstance(value, Path) else value
        settled = {name: value for name, value in (fitted or {}).items() if name in OF_THE_FIT}
        return {**found, **settled}
