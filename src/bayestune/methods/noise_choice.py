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
_FEWEST = 8  # rows of a fold; the loss of fewer would be too noisy

logger = logging.getLogger(__name__)
M = TypeVar("M", bound=Method)


class Candidate(NamedTuple):
    """A factor on the final and the prior's σ, and the share of the run's steps to take."""

    factor: float = 1.0
    length: float = 1.0


@dataclass(frozen=True)
class CrossFit:
    """The candidates' losses on training rows that their fits have not seen.

    The training rows are split into K folds, each class evenly; rows of equal content share a fold.
    Each candidate is fitted K times on all rows but one fold's, for as many epochs as it would be
    on all of them. Its loss on a row of that fold is −log p̄(y), p̄ the average of ten draws.

    Args:
        method: makes the method with a factor on its noise.
        model: a transformers model without adapters.
        scorer: of the task.
        training: of the fit that the choice is for.
        known: losses by candidate, to which this adds.
        place: the folder where they are kept, for a run that is resumed; None for none.

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
        """The losses (N,) in nats of the N training rows, fold after fold."""
        name = _name_of(candidate)
        if name not in self.known:
            losses = [loss for fold in self._folds() for loss in self._losses_on(candidate, fold)]
            self.known[name] = of_first_process(losses)  # so that all choose the same
            self._keep()
        losses = torch.tensor(self.known[name], dtype=torch.float64)
        logger.info("cross-fitted with %s: %.3f nats", name, losses.mean().item())
        return losses

    def _keep(self) -> None:
        """Writes the losses so far to the folder, if there is one."""
        if self.place and is_first_process():
            self.place.mkdir(parents=True, exist_ok=True)
            write_text_whole(self.place / LOSSES_BY_NOISE, json.dumps(self.known))

    def _folds(self) -> Iterator[Sequence[Question]]:
        answers = {row.fingerprint: row.answer or 0 for row in self.scorer.task.train}
        contents = sorted(answers)
        random.Random(self.training.seed).shuffle(contents)
        contents.sort(key=answers.__getitem__)  # a stable sort: each class is dealt out in turn
        fold_of = {content: number % FOLDS for number, content in enumerate(contents)}
        for fold in range(FOLDS):
            yield [row for row in self.scorer.task.train if fold_of[row.fingerprint] == fold]

    def _losses_on(self, candidate: Candidate, fold: Sequence[Question]) -> list[float]:
        """The losses in nats of a fold's rows, after a fit on all others."""
        in_fold = {row.fingerprint for row in fold}
        rows = self.scorer.task.train
        others = tuple(row for row in rows if row.fingerprint not in in_fold)
        scorer = replace(self.scorer, task=replace(self.scorer.task, train=others), warns=False)
        steps = self.training.total_steps(len(rows)) * candidate.length * len(others) / len(rows)
        with tempfile.TemporaryDirectory() as scratch:
            training = replace(
                self.training,
                steps=max(1, round(steps)),
                epochs=None,
                output=Path(scratch),
                resume=False,
            )
            posterior = self.method(candidate.factor).fit(self.model, scorer, training)
        draws = Draws(_DRAWS, bf16=self.training.bf16)
        logits, labels = held_out_logits(posterior, scorer, fold, draws)
        detach(posterior.model)
        log_p = logits.double().log_softmax(-1).logsumexp(0) - math.log(len(logits))
        return (-log_p[torch.arange(len(fold)), labels]).tolist()


def choose(losses: Callable[[Candidate], Tensor]) -> tuple[Candidate, dict[str, float]]:
    """The candidate that a line search finds: first the length, then the noise at that length.

    Shorter runs are tried as long as they are better, then more noise as long as that is better; if
    more noise is worse at once, less. The best candidate replaces the usual settings only if it is
    better by more than one standard error of the rows' differences.

    Args:
        losses: gives a candidate's losses (N,) in nats, of the same N rows for all.

    Returns:
        The choice, and the mean loss of each candidate that was tried, by name.
    """
    usual = Candidate()
    tried = {usual: losses(usual)}

    def best_along(line: Sequence[Candidate], start: Candidate) -> Candidate:
        best = start
        for candidate in line:
            tried[candidate] = losses(candidate)
            if tried[candidate].mean() >= tried[best].mean():
                break
            best = candidate
        return best

    by_length = best_along([Candidate(length=length) for length in LENGTHS], usual)
    best = best_along([by_length._replace(factor=factor) for factor in LARGER], by_length)
    if best == by_length:
        best = best_along([by_length._replace(factor=factor) for factor in SMALLER], by_length)
    gain = tried[usual] - tried[best]
    standard_error = gain.std() / math.sqrt(len(gain))
    chosen = best if gain.mean() > standard_error else usual
    means = {_name_of(candidate): loss.mean().item() for candidate, loss in tried.items()}
    return chosen, means


def choose_noise(
    method: Callable[[float], M], model: nn.Module, scorer: Scorer, training: Training
) -> tuple[M, Training, dict[str, Any]]:
    """Chooses a fit's noise and length by cross-fitting its training rows.

    It takes four to six times as long as one fit, and uses no row but the training rows.

    Args:
        method: makes the method with a factor on its noise.
        model: a transformers model without adapters.
        scorer: of the task.
        training: of the fit; its steps are the most that are tried.

    Returns:
        The method, the training with the chosen steps, and what the fit's report says of the
        choice.

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
    known = _losses_of_resumed(method(1.0), model, scorer, training)
    crossed = CrossFit(method, model, scorer, training, known, training.output)
    chosen, means = choose(crossed.losses)
    steps = max(1, round(training.total_steps(len(scorer.task.train)) * chosen.length))
    facts = {"noise_choice": _name_of(chosen), "cross_fitted_nll": means}
    return method(chosen.factor), replace(training, steps=steps, epochs=None), facts


def _losses_of_resumed(
    method: Method, model: nn.Module, scorer: Scorer, training: Training
) -> dict[str, list[float]]:
    """The losses that a resumed run had computed; a new run removes them."""
    place = training.output
    if place is None:
        return {}
    file = place / LOSSES_BY_NOISE
    if not training.resume:
        in_first_process(partial(_remove, file, place))
    check_started(place, facts_of(method, model, scorer, training), resume=training.resume)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _remove(file: Path, place: Path) -> None:
    """Removes an earlier fit's losses, and puts its checkpoints aside."""
    file.unlink(missing_ok=True)
    start_anew(place)


def _name_of(candidate: Candidate) -> str:
    return f"{candidate.factor:g} × noise and {candidate.length:g} × steps"
