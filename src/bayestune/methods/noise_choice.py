"""The noise and the length of a fit, chosen by cross-fitting its own training rows."""

import json
import logging
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from bayestune.adapters import detach
from bayestune.data import Question
from bayestune.errors import Refusal
from bayestune.forward import Draws
from bayestune.methods.held_out import held_out_logits
from bayestune.methods.method import Method
from bayestune.methods.started import LOSSES_BY_NOISE, check_started, facts_of
from bayestune.methods.workplace import refuse_parts_of
from bayestune.runtime import in_first_process, is_first_process, of_first_process
from bayestune.scoring import Scorer
from bayestune.training import Training, start_anew
from bayestune.whole_files import write_text_whole

FOLDS = 2
LENGTHS = (0.5, 0.25)
LARGER = (2.0, 4.0)
SMALLER = (0.5, 0.25)
_DRAWS = 10
_FEWEST = 8  # rows of a fold, below which its loss says nothing

logger = logging.getLogger(__name__)
M = TypeVar("M", bound=Method)


class Candidate(NamedTuple):
    """A factor on the noise and its prior, and the part of the run's steps that is taken."""

    factor: float = 1.0
    length: float = 1.0


@dataclass(frozen=True)
class CrossFit:
    """What the candidates lose on rows that their fits have not seen.

    The training rows are parted into K folds, each class evenly, equal rows into one. Each
    candidate is fitted K times on all rows but a fold's, for as many epochs as it would be on all
    of them, and asked about that fold: −log p̄(y) with p̄ the average of ten draws.

    Args:
        method: the method with a factor on its noise.
        model: a transformers model without adapters.
        scorer: of the task.
        training: of the fit that the choice is for.
        known: losses by candidate, which grow.
        place: where they are kept, so that a run goes on.

    Reference:
        Stone: Cross-validatory choice and assessment of statistical predictions, 1974,
        https://doi.org/10.1111/j.2517-6161.1974.tb00994.x.
    """

    method: Callable[[float], Method]
    model: nn.Module
    scorer: Scorer
    training: Training
    known: dict[str, list[float]] = field(default_factory=dict)
    place: Path | None = None

    def losses(self, candidate: Candidate) -> Tensor:
        """Nats (N,) of the N training rows, fold after fold."""
        name = _said(candidate)
        if name not in self.known:
            losses = [loss for fold in self._folds() for loss in self._asked(candidate, fold)]
            self.known[name] = of_first_process(losses)  # so that all choose the same
            self._keep()
        losses = torch.tensor(self.known[name], dtype=torch.float64)
        logger.info("cross-fitted with %s: %.3f nats", name, losses.mean().item())
        return losses

    def _keep(self) -> None:
        if self.place and is_first_process():
            self.place.mkdir(parents=True, exist_ok=True)
            write_text_whole(self.place / LOSSES_BY_NOISE, json.dumps(self.known))

    def _folds(self) -> Iterator[Sequence[Question]]:
        answers = {row.fingerprint: row.answer or 0 for row in self.scorer.task.train}
        contents = sorted(answers)
        random.Random(self.training.seed).shuffle(contents)
        contents.sort(key=answers.__getitem__)  # dealt out class by class
        fold_of = {content: number % FOLDS for number, content in enumerate(contents)}
        for fold in range(FOLDS):
            yield [row for row in self.scorer.task.train if fold_of[row.fingerprint] == fold]

    def _asked(self, candidate: Candidate, fold: Sequence[Question]) -> list[float]:
        asked = {row.fingerprint for row in fold}
        every = self.scorer.task.train
        kept = tuple(row for row in every if row.fingerprint not in asked)
        scorer = replace(self.scorer, task=replace(self.scorer.task, train=kept), warns=False)
        steps = self.training.total_steps(len(every)) * candidate.length * len(kept) / len(every)
        with tempfile.TemporaryDirectory() as scratch:
            own = replace(
                self.training,
                steps=max(1, round(steps)),
                epochs=None,
                output=Path(scratch),
                resume=False,
            )
            posterior = self.method(candidate.factor).fit(self.model, scorer, own)
        draws = Draws(_DRAWS, bf16=self.training.bf16)
        logits, labels = held_out_logits(posterior, scorer, fold, draws)
        detach(posterior.model)
        logs = logits.double().log_softmax(-1).logsumexp(0) - math.log(len(logits))
        return (-logs[torch.arange(len(fold)), labels]).tolist()


def choose(losses: Callable[[Candidate], Tensor]) -> tuple[Candidate, dict[str, float]]:
    """The candidate that a line search finds: first the length, then the noise at that length.

    A shorter run is tried while shorter is better, then more noise while more is better, or less.
    What is found replaces the usual settings only if it is better by more than one standard error
    of the rows' differences.

    Args:
        losses: nats (N,) of the same N rows for a candidate.

    Returns:
        The choice, and the mean loss of all that was tried.
    """
    usual = Candidate()
    tried = {usual: losses(usual)}

    def better(candidates: Sequence[Candidate], than: Candidate) -> Candidate:
        for candidate in candidates:
            tried[candidate] = losses(candidate)
            if tried[candidate].mean() >= tried[than].mean():
                break
            than = candidate
        return than

    found = better([Candidate(length=length) for length in LENGTHS], usual)
    more = better([found._replace(factor=factor) for factor in LARGER], found)
    if more == found:
        more = better([found._replace(factor=factor) for factor in SMALLER], found)
    gain = tried[usual] - tried[more]
    error = gain.std() / math.sqrt(len(gain))
    chosen = more if gain.mean() > error else usual
    means = {_said(candidate): loss.mean().item() for candidate, loss in tried.items()}
    return chosen, means


def choose_noise(
    method: Callable[[float], M], model: nn.Module, scorer: Scorer, training: Training
) -> tuple[M, Training, dict[str, Any]]:
    """The method and the training that cross-fitting chooses, and what a record says of it.

    It takes four to six times as long as one fit, and no row but the training rows.

    Args:
        method: the method with a factor on its noise.
        model: a transformers model without adapters.
        scorer: of the task.
        training: whose `steps` are the most that are taken.

    Raises:
        Refusal: if there are too few training rows to leave some out.
    """
    refuse_parts_of('final_std="auto"')
    contents = {row.fingerprint for row in scorer.task.train}
    if len(contents) < FOLDS * _FEWEST:
        raise Refusal(
            f'final_std="auto" leaves training rows out to choose by: got {len(contents)} rows, '
            f"expected at least {FOLDS * _FEWEST}; give final_std as a number, 0.1 is usual"
        )
    known = _known(method(1.0), model, scorer, training)
    crossed = CrossFit(method, model, scorer, training, known, training.output)
    chosen, means = choose(crossed.losses)
    steps = max(1, round(training.total_steps(len(scorer.task.train)) * chosen.length))
    said = {"noise_choice": _said(chosen), "cross_fitted_nll": means}
    return method(chosen.factor), replace(training, steps=steps, epochs=None), said


def _known(
    method: Method, model: nn.Module, scorer: Scorer, training: Training
) -> dict[str, list[float]]:
    """The losses of an interrupted run that goes on."""
    place = training.output
    if place is None:
        return {}
    file = place / LOSSES_BY_NOISE
    if not training.resume:
        in_first_process(partial(_drop, file, place))
    check_started(place, facts_of(method, model, scorer, training), resume=training.resume)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _drop(file: Path, place: Path) -> None:
    """Has a fit that starts anew take no loss and no checkpoint of an earlier one."""
    file.unlink(missing_ok=True)
    start_anew(place)


def _said(candidate: Candidate) -> str:
    return f"{candidate.factor:g} × noise and {candidate.length:g} × steps"
