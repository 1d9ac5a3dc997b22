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
_KEPT = "taught/teacher"
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
        """Fits the base, asks it about the rows, and trains the student on what it says."""
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
        """Goes on with what is there of the same fit, or takes nothing that is there."""
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
        """Those that its steps reach: all, or a choice by the training's seed, in their order."""
        offered = self.offered(scorer)
        reached = self._items(training)
        if reached >= len(offered):
            return offered
        picked = random.Random(training.seed).sample(range(len(offered)), reached)
        return tuple(offered[number] for number in sorted(picked))

    def _items(self, training: Training) -> int:
        """How many rows its steps take, repeated ones too."""
        return self.steps * training.batch_size * training.accumulation

    def _teacher(
        self, model: nn.Module, scorer: Scorer, training: Training, place: Path
    ) -> Posterior:
        """The base's posterior, kept until the student is there unless it has a folder already."""
        kept = place / _KEPT
        if of_first_process(training.resume and (kept / DETAILS).is_file()):
            teacher = load_posterior(model, kept, scorer)
            report = json.loads((kept / _REPORT).read_text(encoding="utf-8"))
            teacher.report = FitReport.of_dict(report)
        else:
            teacher = self.base.fit(model, scorer, replace(training, output=place / "base"))
        if teacher.digest is None:
            in_first_process(partial(_keep, teacher, kept))
            teacher.digest = posterior_digest(kept)
        return teacher

    def ask(self, teacher: Posterior, scorer: Scorer, folder: Path, training: Training) -> None:
        """Writes what the student starts from and learns: the mean adapter and the targets."""
        meter = Meter()
        rows = self.rows(scorer, training)
        draws = teacher.atoms if self.draws is None else count_for(teacher, self.draws)
        if (offered := len(self.offered(scorer))) > len(rows):
            said = "the student learns %d of %d rows, as many as %d steps reach"
            logger.warning(said, len(rows), offered, self.steps)
        visits = -(-self._items(training) // len(rows)) if draws is None else 1
        asking = Asking(teacher, scorer, scorer.encode(rows), draws, visits, training)
        targets = asking.targets(folder)
        content = digest([row.content for row in rows])
        origin = Teacher(teacher.digest or "", draws or "fresh", len(rows), content)
        report = teacher.report.plus(**meter.read())
        known = {"teacher": asdict(origin), "report": report.as_dict()}

        def write() -> None:
            save_posterior(_start(teacher), folder)
            _without_dropout(folder)
            save_targets(targets, folder / _TARGETS)
            write_text_whole(folder / TAUGHT, json.dumps(known))
            forget(folder)

        in_first_process(write)

    def learn(self, model: nn.Module, scorer: Scorer, taught: Path, training: Training) -> Point:
        """Trains the student from what `ask` wrote."""
        encoded = scorer.encode(self.rows(scorer, training))
        targets = load_file(taught / _TARGETS)["targets"]
        rows = []
        for item in range(self._items(training)):
            visit, number = divmod(item, len(encoded))
            rows.append({**encoded[number], "target": targets[visit % len(targets), number]})
        own = replace(training, steps=self.steps, epochs=None, learning_rate=self.learning_rate)
        student = load_adapter(model, taught, scorer, trainable=True)
        report = train(student.model, scorer, own, rows=rows)
        known = json.loads((taught / TAUGHT).read_text(encoding="utf-8"))
        before = FitReport.of_dict(known["report"])
        whole = before.plus(report.seconds, report.peak_memory_mb)
        history = [*before.history, *report.history]
        whole = replace(whole, steps=before.steps + report.steps, history=history)
        return Point(student.model, scorer, report=whole, teacher=Teacher(**known["teacher"]))


@dataclass(frozen=True)
class _Given:
    """A base that is there already."""

    posterior: Posterior
    digest: str

    def fit(self, model: nn.Module, scorer: Scorer, training: Training) -> Posterior:
        """What was given."""
        return self.posterior


def distil(
    posterior: Posterior,
    questions: Sequence[Question],
    method: Distilled | None = None,
    training: Training | None = None,
) -> Point:
    """The student of a posterior in memory: one plain adapter that answers as its draws do.

    It takes the posterior's place on its model: save the posterior first if it shall be used again.

    Args:
        posterior: the teacher, with the scorer of a task.
        questions: what it is asked about; answers are not looked at.
        method: draws, steps, learning rate; its base is not used.
        training: batch size, seed, precision and the like.

    Raises:
        Refusal: if there are no questions, or the posterior's scorer cannot put them, or something
            else is given.

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
    asked = replace(scorer, task=replace(scorer.task, unlabelled=tuple(rows)))
    with tempfile.TemporaryDirectory() as scratch:
        known = posterior_digest(save_posterior(posterior, scratch))
    taught = training.output and training.output / "taught" / TAUGHT
    done = training.resume and taught is not None and taught.is_file()
    base = detach(posterior.model) if done else base_of(posterior.model)
    given = _Given(posterior, known)
    return replace(method or Distilled(), base=given).fit(base, asked, training)


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
    """The mean adapter; of the first member where there is no mean."""
    if isinstance(teacher, Mixture):
        return _start(teacher.members[0])
    if isinstance(teacher, Tempered):
        return _start(teacher.base)
    return Point(teacher.model, teacher.scorer, adapter=teacher.adapter)


def _keep(teacher: Posterior, folder: Path) -> None:
    """Writes a teacher and what its fit took."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text_whole(folder / _REPORT, json.dumps(teacher.report.as_dict()))
    save_posterior(teacher, folder)


def _without_dropout(folder: Path) -> None:
    """Has an adapter that is loaded from a folder train without the dropout of its first fit."""
    path = folder / CONFIG
    config = {**json.loads(path.read_text(encoding="utf-8")), "lora_dropout": 0.0}
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")
