"""Distillation: one plain adapter that gives a posterior's averaged probabilities in one pass."""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from bayestune.adapters import Slots, detach
from bayestune.data import Question
from bayestune.errors import COUNT, POSITIVE, check_fields
from bayestune.forward import Draws
from bayestune.methods.blob import BLoB
from bayestune.methods.method import Method
from bayestune.posteriors import (
    FitReport,
    Mixture,
    Point,
    Posterior,
    Tempered,
    load_adapter,
    save_adapter,
)
from bayestune.scoring import Encoded, Scorer, batches_by_length, row_logits
from bayestune.training import Training, train

_TARGETS = "targets.safetensors"
_TEACHER = "teacher.json"
_BATCH = 8  # rows that share a fresh draw


@dataclass(frozen=True)
class Distilled:
    """A student θ, a plain LoRA, of the base's predictive p̄(x) = E_q p(y | x, A).

    It starts at the base's mean and minimises −Σ_n Σ_c p̄_c(x_n) log p_c(x_n; θ) over rows whose
    answers it does not see: the task's unlabelled rows, or its training rows if there are none. The
    loss is linear in p̄, so with one fresh draw for each batch of a visit its gradient is unbiased
    for the teacher of infinitely many draws.

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
        with tempfile.TemporaryDirectory() as scratch:
            place = training.output or Path(scratch)
            taught = place / "taught"
            if not (training.resume and (taught / _TEACHER).is_file()):
                own = replace(training, output=place / "base")
                teacher = self.base.fit(model, scorer, own)
                self.ask(teacher, scorer, taught, training)
                detach(teacher.model)
            return self.learn(model, scorer, taught, replace(training, output=place / "student"))

    def rows(self, scorer: Scorer) -> tuple[Question, ...]:
        """The rows that the student learns from, without their answers."""
        task = scorer.task
        chosen = task.unlabelled
        if self.labelled or not chosen:
            chosen = (*chosen, *task.train)
        return tuple(replace(row, answer=None) for row in chosen)

    def ask(self, teacher: Posterior, scorer: Scorer, folder: Path, training: Training) -> None:
        """Writes what the student starts from and learns: the mean adapter and the targets."""
        rows = self.rows(scorer)
        encoded = scorer.encode(rows)
        if self.draws is None:
            items = self.steps * training.batch_size * training.accumulation
            targets = fresh_targets(teacher, scorer, encoded, -(-items // len(rows)), training)
        else:
            draws = Draws(self.draws, bf16=training.bf16)
            average = row_logits(teacher, scorer, encoded, draws).double().softmax(-1).mean(0)
            targets = average[None].float()
        folder.mkdir(parents=True, exist_ok=True)
        save_adapter(_start(teacher), folder)
        save_file({"targets": targets.contiguous()}, folder / _TARGETS)
        facts = {"draws": self.draws or "fresh", "rows": len(rows), "rows_digest": _digest(rows)}
        known = {"facts": facts, "report": teacher.report.as_dict()}
        (folder / _TEACHER).write_text(json.dumps(known), encoding="utf-8")

    def learn(self, model: nn.Module, scorer: Scorer, taught: Path, training: Training) -> Point:
        """Trains the student from what `ask` wrote."""
        encoded = scorer.encode(self.rows(scorer))
        targets = load_file(taught / _TARGETS)["targets"]
        items = self.steps * training.batch_size * training.accumulation
        rows = []
        for item in range(items):
            visit, number = divmod(item, len(encoded))
            rows.append({**encoded[number], "target": targets[visit % len(targets), number]})
        own = replace(training, steps=self.steps, epochs=None, learning_rate=self.learning_rate)
        student = load_adapter(model, taught, scorer, trainable=True)
        report = train(student.model, scorer, own, rows=rows)
        known = json.loads((taught / _TEACHER).read_text(encoding="utf-8"))
        teacher = FitReport.of_dict(known["report"])
        whole = teacher.plus(report.seconds, report.peak_memory_mb, teacher=known["facts"])
        history = [*teacher.history, *report.history]
        whole = replace(whole, steps=teacher.steps + report.steps, history=history)
        return Point(student.model, scorer, report=whole)


def fresh_targets(
    teacher: Posterior,
    scorer: Scorer,
    rows: Sequence[Encoded],
    visits: int,
    training: Training,
) -> Tensor:
    """Probabilities (V, N, C) of N rows at V visits; a few rows of a visit share a fresh draw."""
    generator = torch.Generator().manual_seed(training.seed)
    seed = 100_000 * training.seed  # far from those of predictions
    visited: list[Tensor] = []
    for _ in range(visits):
        order = torch.randperm(len(rows), generator=generator).tolist()
        shuffled = [rows[number] for number in order]
        found: dict[int, Tensor] = {}
        for places, batch in batches_by_length(scorer, shuffled, _BATCH):
            seed += 1
            logits = teacher.logits(batch, Draws(1, seed=seed, bf16=training.bf16))[0]
            probabilities = logits.double().softmax(-1).float().cpu()
            found.update(zip([order[place] for place in places], probabilities, strict=True))
        visited.append(pad_sequence([found[number] for number in range(len(rows))], True))
    width = max(part.shape[1] for part in visited)
    return torch.stack([pad(part, (0, width - part.shape[1])) for part in visited])


def _start(teacher: Posterior) -> Slots:
    """The slots of the mean adapter; of the first member where there is no mean."""
    if isinstance(teacher, Mixture):
        return _start(teacher.members[0])
    if isinstance(teacher, Tempered):
        return _start(teacher.base)
    return Slots(teacher.model, teacher.adapter)


def _digest(rows: Sequence[Question]) -> str:
    """A hash of what the rows ask."""
    text = json.dumps([row.content for row in rows])
    return hashlib.sha256(text.encode()).hexdigest()
