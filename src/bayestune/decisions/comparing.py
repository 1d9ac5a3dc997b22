"""Which way of predicting is worth its price on these rows: variants compared, cross-fitted."""

import hashlib
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bayestune.decisions.tempering import (
    LOG_GRID,
    check_draws,
    log_predictive,
    nll_by_temperature,
)
from bayestune.errors import Refusal
from bayestune.metrics import accuracy, aurc, brier

_log = logging.getLogger(__name__)
_Z = 1.645  # standard errors that a normal variable exceeds with probability 5 %


@dataclass(frozen=True, eq=False)
class Variant:
    """A way of predicting, such as the mean, ten draws, or the student.

    Args:
        logits: (S, N, C) of all held-out rows, -inf where a row has fewer options.
        milliseconds: of one decision.
        settings: what a prediction needs to do the same again, as JSON; kept and not looked at.
        extra: scores of this variant by name, (N,) each, such as a distance in its adapter.
    """

    logits: Tensor
    milliseconds: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Labelled rows that training did not see.

    Args:
        labels: y (N,), indices into each row's options.
        contents: each row's content as one text, which decides the part that the row is in.
        unsure: index of the option that means "I do not know", (N,); −1 in rows without one.
        extra: further scores by name, (N,) each, whatever the variant: the prompt's length.
        seen: contents of the rows that training saw.
        same: a key for each row. Rows with equal keys count once, such as those with the same
            options in another order. The contents unless given.
        answers: what each label says, by which rows that are the same contradict each other in
            whichever order their options are. The labels unless given.
    """

    labels: Tensor
    contents: Sequence[str]
    unsure: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    seen: Collection[str] = frozenset()
    same: Sequence[str] | None = None
    answers: Sequence[str] | None = None

    def __post_init__(self) -> None:
        count = len(self.labels)
        columns = [self.contents, *self.extra.values()]
        others = (self.unsure, self.same, self.answers)
        columns += [column for column in others if column is not None]
        if any(len(column) != count for column in columns):
            got = f"columns of {[len(column) for column in columns]} rows for {count} labels"
            raise Refusal(f"got {got}; expected as many of each; give one a row")
        seen = [content for content in self.contents if content in self.seen]
        if seen:
            raise Refusal(
                f"got {len(seen)} of {count} rows that training saw, such as {seen[0][:60]!r}; "
                "expected others: a model is surer of what it was fitted on; hold rows out first"
            )

    def order(self) -> Tensor:
        """Indices of the rows in the order of their contents' digests, one of rows that repeat.

        The order is as good as random, and does not depend on the order of the file. Nor does it
        which of several contradicting rows counts: were it the first, then in a file that is sorted
        by label it would always be of one class.
        """
        indices = self.distinct()
        repeated = len(self.contents) - len(indices)
        if repeated:
            _log.warning("%d rows repeat the content of others: each content counts once", repeated)
            self._warn_of_contradictions()
        return torch.tensor(indices)

    def distinct(self) -> list[int]:
        """The indices that `order` gives, without warnings of repeated rows."""
        first: dict[str, tuple[str, str, int]] = {}  # by key, what the row with it is sorted by
        rows = zip(self.contents, self._keys, self._answers, strict=True)
        for index, (content, key, answer) in enumerate(rows):
            rank = (_digest(f"part\0{content}"), _digest(f"label\0{content}\0{answer}"), index)
            first[key] = min(rank, first.get(key, rank))
        return [index for *_, index in sorted(first.values())]

    @property
    def _keys(self) -> Sequence[str]:
        """A key for each row, equal for rows that count once."""
        return self.contents if self.same is None else self.same

    @property
    def _answers(self) -> Sequence[str]:
        """What each row's label says, as text."""
        return list(map(str, self.labels.tolist())) if self.answers is None else self.answers

    def _warn_of_contradictions(self) -> None:
        """Warns of rows that have the key of an earlier row and another answer."""
        first_answers: dict[str, str] = {}  # by key
        contradicting = []
        for content, key, answer in zip(self.contents, self._keys, self._answers, strict=True):
            if first_answers.setdefault(key, answer) != answer:
                contradicting.append(content)
        if contradicting:
            warning = "%d rows repeat a content with another label, such as %r: one of them counts"
            _log.warning(warning, len(contradicting), contradicting[0][:60])

    def digest(self) -> str:
        """SHA-256 of contents and labels, whatever their order."""
        pairs = zip(self.contents, self.labels.tolist(), strict=True)
        lines = sorted(f"{content}\0{label}" for content, label in pairs)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Trial:
    """A variant, with a temperature or without, on the rows that one may choose on.

    Args:
        variant: its name.
        tempered: whether a temperature was fitted, on the other folds each time.
        milliseconds: of one decision.
        losses: −log p̄(y) of each row, (N,), in nats.
        figures: means over the rows: accuracy, nll, brier, aurc.
    """

    variant: str
    tempered: bool
    milliseconds: float
    losses: Tensor
    figures: dict[str, float]

    def worse_by(self, other: "Trial") -> tuple[float, float]:
        """Mean difference of the losses and its standard error over rows, in nats."""
        difference = self.losses - other.losses
        error = difference.std().item() / math.sqrt(len(difference))
        return difference.mean().item(), error


def check_variants(variants: Mapping[str, Variant], held_out: HeldOut) -> None:
    """Refuses an empty mapping, and variants whose logits are not of the held-out rows."""
    if not variants:
        raise Refusal("got no variants; expected one or more; give the mean's logits at least")
    sizes = {tuple(variant.logits.shape[1:]) for variant in variants.values()}
    if len(sizes) > 1:
        raise Refusal(f"got variants of (N, C) {sorted(sizes)}; expected one; use the same rows")
    for variant in variants.values():
        check_draws(variant.logits, held_out.labels)
        replace(held_out, extra=variant.extra)  # refuses other numbers of rows


def compare(variants: Mapping[str, Variant], labels: Tensor, folds: int = 5) -> list[Trial]:
    """Each variant as it is, and with a temperature fitted on the other folds.

    Args:
        variants: by name.
        labels: y (N,).
        folds: K; row n is in fold n mod K.
    """
    trials = []
    for name, variant in variants.items():
        plain = log_predictive(variant.logits)
        tempered = _cross_fitted(variant.logits, labels, folds)
        for log_p, is_tempered in ((plain, False), (tempered, True)):
            p = log_p.exp()
            losses = -log_p.gather(-1, labels[:, None])[:, 0]
            figures = {
                "accuracy": accuracy(p, labels),
                "nll": losses.mean().item(),
                "brier": brier(p, labels),
                "aurc": aurc(p, labels),
            }
            trials.append(Trial(name, is_tempered, variant.milliseconds, losses, figures))
    return trials


def _cross_fitted(logits: Tensor, labels: Tensor, folds: int) -> Tensor:
    """log p̄ (N, C), each row at the best temperature for the rows of the other folds."""
    losses = nll_by_temperature(logits, labels)
    fold_of = torch.arange(len(labels)) % folds
    log_p = torch.empty(logits.shape[1:], dtype=torch.float64)
    for fold in range(folds):
        in_fold = fold_of == fold
        best = losses[:, ~in_fold].sum(1).argmin()
        log_p[in_fold] = log_predictive(logits[:, in_fold], LOG_GRID[best].exp().item())
    return log_p


def kept(trials: Sequence[Trial]) -> tuple[Trial, list[dict[str, Any]]]:
    """The cheapest trial that is not significantly worse than the best, and the table.

    Worse: the mean difference of −log p̄(y) over the same rows exceeds 1.645 standard errors
    (one-sided, 5 %, not corrected for the number of trials). Of equally cheap ones it is the one of
    the lowest NLL.

    Args:
        trials: one or more, all on the same rows.

    Returns:
        The trial, and one row a trial: variant, temperature (whether there is one), milliseconds,
        accuracy, nll, brier, aurc, worse_by and its standard_error in nats, kept.
    """
    best = min(trials, key=lambda trial: trial.figures["nll"])
    table = []
    good = []
    for trial in sorted(trials, key=lambda trial: (trial.milliseconds, trial.figures["nll"])):
        difference, error = trial.worse_by(best)
        if difference <= _Z * error:
            good.append(trial)
        table.append(
            {
                "variant": trial.variant,
                "temperature": trial.tempered,
                "milliseconds": trial.milliseconds,
                **trial.figures,
                "worse_by": difference,
                "standard_error": error,
                "kept": good[:1] == [trial],
            }
        )
    return good[0], table
