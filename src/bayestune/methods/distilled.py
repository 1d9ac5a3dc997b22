"""Distillation: one plain adapter that gives a posterior's averaged probabilities in one pass."""

import json
import logging
import random
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from bayestune.adapters import CONFIG, base_of, detach
from bayestune.data import Question, digest, rows_digest
from bayestune.errors import COUNT, POSITIVE, Refusal, check_fields
from bayestune.methods.asking import Asking, forget, save_targets
from bayestune.methods.blob import BLoB
from bayestune.methods.method import Method
from bayestune.methods.started import TAUGHT, check_started, facts_of
from bayestune.methods.workplace import refuse_parts_of, workplace
from bayestune.posteriors import (
    DETAILS,
    FitReport,
    Mixture,
    Point,
    Posterior,
    Teacher,
    Tempered,
    count_for,
    load_adapter,
    load_posterior,
    posterior_digest,
    save_posterior,
)
from bayestune.runtime import in_first_process, of_first_process
from bayestune.scoring import Scorer
from bayestune.training import Meter, Training, train
from bayestune.whole_files import write_text_whole

logger = logging.getLogger(__name__)

_TARGETS = "targets.safetensors"
_TEACHER = "taught/teacher"  # the folder of the base's posterior until the student is trained
_REPORT = "report.json"


@dataclass(frozen=True)
class Distilled:
    """A student θ, a plain LoRA, of the base's predictive p̄(x) = E_q p(y | x, A).

    It starts at the base's mean and minimises −Σ_n Σ_c p̄_c(x_n) log p_c(x_n; θ) over rows whose
    answers it does not see: the task's unlabelled rows, or its training rows if there are none. The
    loss is linear in p̄, so with one fresh draw for each batch of a visit its gradient is unbiased
    for the teacher of infinitely many draws. A base whose draws are counted, such as an ensemble of
    points, is averaged over all of them instead.

    Args:
        base: the teacher.
        draws: S of a fixed average as the teacher; None takes fresh draws.
        steps: of the student's training.
        learning_rate: of its AdamW, at its peak.
        labelled: whether training rows, without their answers, are added to the unlabelled ones.

    Raises:
        Refusal: if a number is not positive.

    Reference:
        Korattikara, Rathod, Murphy, Welling: Bayesian dark knowledge, NeurIPS 2015,
        https://arxiv.org/abs/1506.04416; for Bayesian LoRA https://arxiv.org/abs/2505.11731.
    """

    base: Method = field(default_factory=BLoB)
    draws: int | None = None
    steps: int = 200
    learning_rate: float = 3e-4
    labelled: bool = False

    def __post_init__(self) -> None:
        check_fields(self, steps=COUNT, learning_rate=POSITIVE, draws=COUNT)

    def fit(self, model: nn.Module, scorer: Scorer, training: Training) -> Point:
        """Fits the base, asks it about the rows, and trains the student on its probabilities."""
        refuse_parts_of("Distilled")
        with workplace(training) as place:
            taught = place / "taught"
            self._begin(place, model, scorer, training)
            if not of_first_process(training.resume and (taught / TAUGHT).is_file()):
                teacher = self._teacher(model, scorer, training, place)
                self.ask(teacher, scorer, taught, training)
                detach(teacher.model)
            return self.learn(model, scorer, taught, replace(training, output=place / "student"))

    def _begin(self, place: Path, model: nn.Module, scorer: Scorer, training: Training) -> None:
        """Checks that a resumed fit is the same one; removes the parts of others otherwise."""
        facts = facts_of(self, model, scorer, training)
        facts["the student's rows"] = rows_digest(self.rows(scorer, training))
        parts = [place / name for name in ("base", "taught", "student")]
        check_started(place, facts, parts, resume=training.resume)

    def offered(self, scorer: Scorer) -> tuple[Question, ...]:
        """The rows that the student may learn from, without their answers."""
        task = scorer.task
        chosen = task.unlabelled
        if self.labelled or not chosen:
            chosen = (*chosen, *task.train)
        return tuple(replace(row, answer=None) for row in chosen)

    def rows(self, scorer: Scorer, training: Training) -> tuple[Question, ...]:
        """The rows that the student learns from: as many of those offered as its steps take.

        If there are more, they are chosen by the training's seed and stay in order.
        """
        offered = self.offered(scorer)
        num_taken = self._rows_taken(training)
        if num_taken >= len(offered):
            return offered
        chosen = random.Random(training.seed).sample(range(len(offered)), num_taken)
        return tuple(offered[number] for number in sorted(chosen))

    def _rows_taken(self, training: Training) -> int:
        """How many rows the student's steps take, repeated ones included."""
        return self.steps * training.batch_size * training.accumulation

    def _teacher(
        self, model: nn.Module, scorer: Scorer, training: Training, place: Path
    ) -> Posterior:
        """The base's posterior: read if resumed, else fitted, and saved unless it has a folder."""
        folder = place / _TEACHER
        if of_first_process(training.resume and (folder / DETAILS).is_file()):
            teacher = load_posterior(model, folder, scorer)
            report = json.loads((folder / _REPORT).read_text(encoding="utf-8"))
            teacher.report = FitReport.of_dict(report)
        else:
            teacher = self.base.fit(model, scorer, replace(training, output=place / "base"))
        if teacher.digest is None:
            in_first_process(partial(_save_teacher, teacher, folder))
            teacher.digest = posterior_digest(folder)
        return teacher

    def ask(self, teacher: Posterior, scorer: Scorer, folder: Path, training: Training) -> None:
        """Writes what the student starts from and learns: the mean adapter and the targets.

        Args:
            teacher: the posterior.
            scorer: of the task whose rows the student learns from.
            folder: where to; `learn` reads it.
            training: seed, precision and batch size.
        """
        meter = Meter()
        rows = self.rows(scorer, training)
        draws = teacher.atoms if self.draws is None else count_for(teacher, self.draws)
        num_offered = len(self.offered(scorer))
        if num_offered > len(rows):
            message = "the student learns %d of %d rows, as many as %d steps reach"
            logger.warning(message, len(rows), num_offered, self.steps)
        visits = -(-self._rows_taken(training) // len(rows)) if draws is None else 1
        asking = Asking(teacher, scorer, scorer.encode(rows), draws, visits, training)
        targets = asking.targets(folder)
        content = digest([row.content for row in rows])
        origin = Teacher(teacher.digest or "", draws or "fresh", len(rows), content)
        report = teacher.report.plus(**meter.read())
        record = {"teacher": asdict(origin), "report": report.as_dict()}

        def write() -> None:
            save_posterior(_start(teacher), folder)
            _without_dropout(folder)
            save_targets(targets, folder / _TARGETS)
            write_text_whole(folder / TAUGHT, json.dumps(record))
            forget(folder)

        in_first_process(write)

    def learn(self, model: nn.Module, scorer: Scorer, taught: Path, training: Training) -> Point:
        """Trains the student from what `ask` wrote.

        Args:
            model: the base model, without adapters.
            scorer: as it was given to `ask`.
            taught: the folder that `ask` wrote.
            training: of the student, but for its steps and learning rate.
        """
        encoded = scorer.encode(self.rows(scorer, training))
        targets = load_file(taught / _TARGETS)["targets"]
        rows = []
        for item in range(self._rows_taken(training)):
            visit, number = divmod(item, len(encoded))
            rows.append({**encoded[number], "target": targets[visit % len(targets), number]})
        training = replace(
            training, steps=self.steps, epochs=None, learning_rate=self.learning_rate
        )
        student = load_adapter(model, taught, scorer, trainable=True)
        report = train(student.model, scorer, training, rows=rows)
        record = json.loads((taught / TAUGHT).read_text(encoding="utf-8"))
        before = FitReport.of_dict(record["report"])
        total = before.plus(report.seconds, report.peak_memory_mb)
        history = [*before.history, *report.history]
        total = replace(total, steps=before.steps + report.steps, history=history)
        return Point(student.model, scorer, report=total, teacher=Teacher(**record["teacher"]))


@dataclass(frozen=True)
class _Given:
    """A base that is fitted already: its `fit` returns the posterior."""

    posterior: Posterior
    digest: str

    def fit(self, model: nn.Module, scorer: Scorer, training: Training) -> Posterior:
        """The posterior."""
        return self.posterior


def distil(
    posterior: Posterior,
    questions: Sequence[Question],
    method: Distilled | None = None,
    training: Training | None = None,
) -> Point:
    """The student of a posterior in memory: one plain adapter that answers as its draws do.

    It replaces the posterior's adapters on the model: save the posterior first to use it again.

    Args:
        posterior: the teacher, with the scorer of a task.
        questions: what it is asked about; their answers are not read.
        method: draws, steps, learning rate; its base is not used.
        training: batch size, seed, precision and the like.

    Returns:
        The student, on the posterior's model.

    Raises:
        Refusal: if there are no questions, the posterior's scorer cannot put them, or an argument
            is of another type.

    Example:
        >>> distil(load_posterior(model, "runs/blob", scorer), questions)  # doctest: +SKIP
    """
    questions = tuple(questions)
    _check_kinds(posterior, questions, method)
    scorer = posterior.scorer
    if not isinstance(scorer, Scorer):
        raise Refusal(
            f"got a posterior with the scorer {scorer!r}, which cannot put questions; expected one "
            "of make_scorer; take posterior.on(scorer)"
        )
    if not questions:
        raise Refusal("got no questions; expected one or more, with or without answers; give some")
    training = training or Training()
    names: Any = getattr(scorer, "class_names", None)
    rows = [row.with_options(names) if names else row for row in questions]
    on_questions = replace(scorer, task=replace(scorer.task, unlabelled=tuple(rows)))
    with tempfile.TemporaryDirectory() as scratch:
        saved_digest = posterior_digest(save_posterior(posterior, scratch))
    taught = training.output and training.output / "taught" / TAUGHT
    was_asked = training.resume and taught is not None and taught.is_file()
    base_model = detach(posterior.model) if was_asked else base_of(posterior.model)
    method = replace(method or Distilled(), base=_Given(posterior, saved_digest))
    return method.fit(base_model, on_questions, training)


def _check_kinds(posterior: Any, questions: Any, method: Any) -> None:
    for value, kind, remedy in (
        (posterior, Posterior, "load a folder with load_posterior(model, folder, scorer)"),
        (method or Distilled(), Distilled, "its base is the posterior itself"),
        *((row, Question, "load_rows reads a file of them") for row in questions),
    ):
        if not isinstance(value, kind):
            raise Refusal(
                f"distil takes a posterior, questions and a Distilled: got {value!r:.60}, expected "
                f"a {kind.__name__}; {remedy}"
            )


def _start(teacher: Posterior) -> Point:
    """Where the student starts: the mean adapter, of the first member if it is a mixture."""
    if isinstance(teacher, Mixture):
        return _start(teacher.members[0])
    if isinstance(teacher, Tempered):
        return _start(teacher.base)
    return Point(teacher.model, teacher.scorer, adapter=teacher.adapter)


def _save_teacher(teacher: Posterior, folder: Path) -> None:
    """Writes a teacher and the report of its fit."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text_whole(folder / _REPORT, json.dumps(teacher.report.as_dict()))
    save_posterior(teacher, folder)


def _without_dropout(folder: Path) -> None:
    """Has an adapter that is loaded from a folder train without the dropout of its first fit."""
    path = folder / CONFIG
    config = {**json.loads(path.read_text(encoding="utf-8")), "lora_dropout": 0.0}
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")
