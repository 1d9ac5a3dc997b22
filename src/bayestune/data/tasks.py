"""A task: rows to train on, to choose on and to evaluate on."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from bayestune.data import prompts
from bayestune.data.answer_readings import AnswerIs
from bayestune.data.prompts import Prompt
from bayestune.data.questions import Question
from bayestune.errors import Refusal

Part = Literal["evaluation", "held_out"]


@dataclass(frozen=True)
class Task:
    """Rows to train on, to choose on and to evaluate on, and their prompt.

    Args:
        name: of the task.
        train: rows that a fit may see.
        evaluation: rows that nothing is fitted or chosen on.
        held_out: rows taken from train, for choosing anything.
        prompt: the templates.
        unlabelled: rows without answers, for a student to learn a posterior on.
        answer_is: what the answers of the training file were, as far as that is known.
    """

    name: str
    train: tuple[Question, ...]
    evaluation: tuple[Question, ...]
    held_out: tuple[Question, ...] = ()
    prompt: Prompt = prompts.CHOICES
    unlabelled: tuple[Question, ...] = ()
    answer_is: AnswerIs | None = None

    def __post_init__(self) -> None:
        check_ids(self.evaluation)

    def part(self, name: Part) -> tuple[Question, ...]:
        """The rows of a part."""
        return self.evaluation if name == "evaluation" else self.held_out

    @property
    def seen(self) -> tuple[Question, ...]:
        """The evaluation rows whose content stands among training or unlabelled rows too."""
        learnt = {row.fingerprint for row in (*self.train, *self.unlabelled)}
        return tuple(row for row in self.evaluation if row.fingerprint in learnt)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The options that all rows have, in the order of the first one; None if they differ."""
        rows = (*self.train, *self.held_out, *self.evaluation)
        sets = {frozenset(row.options) for row in rows}
        return rows[0].options if len(sets) == 1 else None

    @property
    def shared_options(self) -> tuple[str, ...]:
        """The options that all training rows have in one order; none if they differ."""
        orders = {row.options for row in self.train}
        return orders.pop() if len(orders) == 1 else ()

    def in_class_order(self, classes: Sequence[str] | None = None) -> "Task":
        """The task with every row's options in one order, as a classification head has classes.

        Args:
            classes: the order; None for that of the first row.

        Raises:
            Refusal: if a row has other options.
        """
        rows = (*self.train, *self.held_out, *self.evaluation, *self.unlabelled)
        if not rows:
            return self
        order = tuple(classes or rows[0].options)
        parts = {}
        for part in ("train", "held_out", "evaluation", "unlabelled"):
            parts[part] = tuple(row.with_options(order) for row in getattr(self, part))
        return replace(self, **parts)

    def subset(
        self,
        train: int | None = None,
        evaluation: int | None = None,
        holdout: float = 0.0,
        seed: int = 0,
        unlabelled: int = 0,
    ) -> "Task":
        """The task with a seeded part of train held out, then at most so many rows of each part.

        Held-out rows whose content also stands in train are dropped (public sets repeat some).

        Args:
            train: rows to keep of what is left of train; None keeps all.
            evaluation: rows to keep of evaluation; None keeps all.
            holdout: the part of train held out, in [0, 1).
            seed: of the choice.
            unlabelled: how many further rows of train lose their answers and are kept.

        Raises:
            Refusal: if `holdout` is out of range or leaves a part empty, or a count is negative.
        """
        if not 0 <= holdout < 1:
            raise Refusal(f"holdout must lie in [0, 1): got {holdout}")
        if min(train or 0, evaluation or 0, unlabelled) < 0:
            raise Refusal(
                f"rows to keep must not be negative: got train={train}, evaluation={evaluation}, "
                f"unlabelled={unlabelled}"
            )
        rows = list(self.train)
        if holdout or unlabelled or train is not None:  # else all rows stay, in their order
            random.Random(seed).shuffle(rows)
        count = round(holdout * len(rows))
        if holdout and not 0 < count < len(rows):
            raise Refusal(
                f"holdout={holdout} of {len(rows)} training rows leaves a part empty; change it"
            )
        not_held_out = rows[count:]
        labelled, without_answers = _parted(not_held_out, train, unlabelled)
        contents = {row.content for row in not_held_out}
        fingerprints = {row.fingerprint for row in labelled}  # whatever their options' order
        held_out = []
        for row in rows[:count]:
            if row.content not in contents and row.fingerprint not in fingerprints:
                held_out.append(row)
        evaluated = self.evaluation
        if evaluation is not None and evaluation < len(evaluated):
            evaluated = tuple(random.Random(seed).sample(evaluated, evaluation))
        return replace(
            self,
            train=labelled,
            unlabelled=(*self.unlabelled, *without_answers),
            held_out=tuple(held_out),
            evaluation=evaluated,
        )


def _parted(
    rows: Sequence[Question], train: int | None, unlabelled: int
) -> tuple[tuple[Question, ...], tuple[Question, ...]]:
    """The first `train` rows, and the next `unlabelled` ones without their answers.

    If `train` is None, it is all but the last `unlabelled` ones.
    """
    num_labelled = len(rows) - unlabelled if train is None else min(train, len(rows))
    if (num_labelled < 1 and unlabelled) or num_labelled + unlabelled > len(rows):
        raise Refusal(
            f"too few rows to spare: got {len(rows)} of train, expected {max(num_labelled, 1)} "
            f"with answers and {unlabelled} more without; ask for fewer"
        )
    others = rows[num_labelled : num_labelled + unlabelled]
    return tuple(rows[:num_labelled]), tuple(replace(row, answer=None) for row in others)


def check_ids(rows: Sequence[Question]) -> None:
    """Refuses rows of which two share an id."""
    counts = Counter(row.id for row in rows)
    for key, count in counts.most_common(1):
        if count > 1:
            raise Refusal(
                f"rows to evaluate on share an id: got {key!r} {count} times, expected an id for "
                "each row, by which results are paired; number them"
            )


def own_task(name: str, train: Sequence[Question], evaluation: Sequence[Question]) -> Task:
    """A task of the user's own rows; its prompt has a passage if any row has a context."""
    has_passages = any(row.context for row in (*train, *evaluation))
    prompt = prompts.PASSAGE_CHOICES if has_passages else prompts.CHOICES
    return Task(name, tuple(train), tuple(evaluation), prompt=prompt)


def with_unlabelled(task: Task, rows: Sequence[Question]) -> Task:
    """The task with these rows, without their answers, in the place of its unlabelled ones.

    Args:
        task: the task.
        rows: for a student to learn on.

    Raises:
        Refusal: if one has a context, or earlier messages, for which the task's prompt has no
            place.
    """
    templates = task.prompt.letter + task.prompt.text
    if any(row.context for row in rows) and "{context}" not in templates:
        raise Refusal(
            f"unlabelled rows have a context: got training rows of {task.name} without, expected "
            "both or neither, because its prompt has no place for one; drop the column"
        )
    return replace(task, unlabelled=tuple(replace(row, answer=None) for row in rows))


def check_trainable(task: Task) -> None:
    """Refuses training rows that teach nothing: none at all, or all with the same answer."""
    if not task.train:
        raise Refusal(
            f"task {task.name} has no training rows; train on another task and evaluate on this one"
        )
    if len({row.answer for row in task.train}) == 1:
        raise Refusal(
            f"all {len(task.train)} training rows of {task.name} have the same answer, option "
            f"{task.train[0].answer}: got one class, expected two or more"
        )
