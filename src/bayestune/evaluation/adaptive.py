"""Adaptive draws: rounds of held draws over a data set, in which only those rows take part that need more."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from bayestune.data import Question
from bayestune.forward import Draws
from bayestune.posteriors import Posterior, Prediction, count_for
from bayestune.scoring import Scorer, row_logits

# Maps (which rows, which draws) to their logits (S, N, C), of these draws and rows only.
Source = Callable[[list[int], range], Tensor]
_ROUNDING = 1e-9  # more than float64 loses in the sums of any number of draws


@dataclass(frozen=True)
class Adaptive:
    """Sequential stopping: when a row has been drawn often enough. Without a rule every row has all draws.

    A row stops as soon as one of the rules holds, checked after each round. The rules do different things:

    * `decided` leaves every decision as that of all S draws, for certain. With n draws done the leader's lead in
      summed probability is n·(p₁ − p₂); each draw to come takes at most 1 from it, so that the leader stays while
      n·(p₁ − p₂) > S − n. No row can stop before half of the draws.
    * `standard_error` stops a row whose averaged probabilities are known: max_c s_c/√n ≤ target, with s_c the standard
      deviation of class c's probability over the n draws so far, n − 1 in its denominator.

    Each draw is one of the posterior's, exactly; an average over a number of draws that depends on them is slightly
    biased. By the standard error a row stops when its first draws happen to agree. Where one draw in ten dissents, most
    rows stop before it comes and are left too sure, and the others go on, which does not make up for it. The smaller
    `least`, the larger the bias, for a standard error estimated from few draws is itself uncertain. Under `decided`
    alone the decisions are those of all draws, but a stopped row's probabilities are still those of its first draws.

    Args:
        most: S, the largest number of draws of a row.
        least: draws of the first round, which every row has.
        round_size: draws of each later round. With a shared prefix each round reads the prefix again.
        standard_error: stop a row whose probabilities' largest standard error is at most this; None for no such rule.
        decided: stop a row whose decision no further draw can change.

    Raises:
        ValueError: if a number is too small.

    Reference:
        Chow, Robbins (1965), On the asymptotic theory of fixed-width sequential confidence intervals for the mean,
        https://doi.org/10.1214/aoms/1177700156
    """

    most: int = 10
    least: int = 4
    round_size: int = 2
    standard_error: float | None = None
    decided: bool = False

    def __post_init__(self) -> None:
        if self.most < 1 or self.least < 2 or self.round_size < 1:
            raise ValueError(
                f"too few draws: got most={self.most}, least={self.least}, round_size={self.round_size}, expected 1, "
                "2 and 1 or more; one draw has no standard error, and the mean (0) needs no rounds"
            )
        if self.standard_error is not None and not self.standard_error > 0:
            raise ValueError(
                f"a standard error is only reached if it is positive: got {self.standard_error}, expected such as "
                "0.02; None for no such rule"
            )

    @property
    def stops(self) -> bool:
        """Whether there is a rule by which a row may stop early."""
        return self.decided or self.standard_error is not None

    def rounds(self) -> Iterator[range]:
        """The draws of each round: `least` of them, then `round_size` at a time, as long as any are left.

        Example:
            >>> list(Adaptive(most=9, least=4, round_size=3).rounds())
            [range(0, 4), range(4, 7), range(7, 9)]
        """
        first, end = 0, min(self.least, self.most)
        while first < end:
            yield range(first, end)
            first, end = end, min(end + self.round_size, self.most)

    def finished(self, means: Tensor, errors: Tensor, count: int) -> Tensor:
        """Which rows stop after `count` draws, of averaged probabilities and standard errors (N, C): bools (N,)."""
        done = torch.zeros(len(means), dtype=torch.bool)
        if self.standard_error is not None:
            done |= errors.amax(-1) <= self.standard_error
        if self.decided:
            first, second = pad(means, (0, 1)).topk(2).values.unbind(-1)
            done |= count * (first - second) > self.most - count + _ROUNDING
        return done


@dataclass(frozen=True)
class AdaptivePrediction(Prediction):
    """A prediction whose averages are over each row's own number of draws.

    Args:
        draws_used: how many each row had, (N,).
    """

    draws_used: Tensor

    @property
    def total_draws(self) -> int:
        """Draws of all rows together."""
        return int(self.draws_used.sum())

    @classmethod
    def of(cls, logits: Tensor) -> "AdaptivePrediction":
        """That of all draws for every row, of their logits (S, N, C)."""
        return cls(
            **vars(Prediction.of(logits)), draws_used=torch.full((logits.shape[1],), len(logits))
        )


@dataclass
class _Sums:
    """Over each row's draws, in float64: their number (N,), probabilities and squares (N, C), and entropies (N,)."""

    count: Tensor
    total: Tensor
    squares: Tensor
    entropy: Tensor

    @classmethod
    def of(cls, num_rows: int, classes: int) -> "_Sums":
        empty = torch.zeros(num_rows, classes, dtype=torch.float64)
        return cls(
            torch.zeros(num_rows, dtype=torch.long), empty, empty.clone(), empty.new_zeros(num_rows)
        )

    def add(self, rows: list[int], logits: Tensor) -> None:
        """Adds draws (S, N, C) of some rows, which may have fewer options than the widest of all."""
        probabilities = logits.double().softmax(-1)
        probabilities = pad(probabilities, (0, self.total.shape[1] - probabilities.shape[-1]))
        self.count[rows] += len(logits)
        self.total[rows] += probabilities.sum(0)
        self.squares[rows] += probabilities.square().sum(0)
        self.entropy[rows] += torch.special.entr(probabilities).sum((0, -1))

    def moments(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Averaged probabilities of rows with the same number n of draws, and their standard errors s/√n."""
        count = self.count[rows, None]
        means = self.total[rows] / count
        variance = (self.squares[rows] - count * means.square()).clamp_min(0) / (count - 1)
        return means, (variance / count).sqrt()

    def prediction(self) -> AdaptivePrediction:
        probabilities = self.total / self.count[:, None]
        total, expected = torch.special.entr(probabilities).sum(-1), self.entropy / self.count
        return AdaptivePrediction(
            probabilities, total, expected, (total - expected).clamp_min(0), self.count
        )


def in_rounds(source: Source, num_rows: int, adaptive: Adaptive) -> AdaptivePrediction:
    """Draws in rounds from any source of logits, such as draws that were saved.

    Args:
        source: gives the logits (S, N, C) of the rows and draws that it is asked for; asked for all rows first.
        num_rows: N.
        adaptive: the rules.

    Returns:
        Probabilities (N, C), entropies (N,) in nats, and the draws used (N,).

    Raises:
        ValueError: if there are no rows.

    Example:
        >>> agreed, mixed = [[2.0, 0.0]] * 6, [[2.0, 0.0], [0.0, 2.0]] * 3
        >>> logits = torch.tensor([agreed, mixed]).transpose(0, 1)
        >>> saved = lambda rows, draws: logits[draws.start : draws.stop, rows]
        >>> in_rounds(saved, 2, Adaptive(most=6, standard_error=0.01)).draws_used.tolist()
        [4, 6]
    """
    if num_rows < 1:
        raise ValueError("nothing to predict: got no rows, expected one or more")
    rows, sums = list(range(num_rows)), None
    for draws in adaptive.rounds():
        logits = source(rows, draws).cpu()
        sums = sums or _Sums.of(num_rows, logits.shape[-1])
        sums.add(rows, logits)
        if adaptive.stops and draws.stop < adaptive.most:
            finished = adaptive.finished(*sums.moments(rows), draws.stop).tolist()
            rows = [row for row, stop in zip(rows, finished, strict=True) if not stop]
        if not rows:
            break
    assert sums is not None  # there is always a first round
    return sums.prediction()


def predict_adaptively(
    posterior: Posterior,
    scorer: Scorer,
    questions: Sequence[Question],
    adaptive: Adaptive,
    *,
    seed: int = 0,
    batch_size: int = 8,
    max_tokens: int = 16384,
    shared_prefix: int | None = None,
    bf16: bool = False,
    progress: bool = False,
) -> AdaptivePrediction:
    """The predictive of all questions, each averaged over as many draws as it needs; see `Adaptive` for what that does.

    After each round the unfinished rows are batched anew, by length: what is not drawn is not computed.

    Args:
        posterior: one with `atoms` is averaged over those, for every row, and no row stops early.
        scorer: the task, bound to the tokenizer.
        questions: the rows.
        adaptive: the largest number of draws, the rounds and the rules.
        seed: of the set of draws; a row's draws are the first ones of those that `predict` takes.
        batch_size: rows of a batch.
        max_tokens: bound on the tokens of one forward pass.
        shared_prefix: m; an approximation, off by default, see `predict`.
        bf16: bfloat16 autocast.
        progress: show a progress bar for each round.

    Returns:
        Probabilities (N, C), entropies (N,) in nats, and the draws used (N,).

    Raises:
        ValueError: if there are no rows, or a prefix cannot be shared.
    """
    encoded = scorer.encode(questions)
    if posterior.atoms is not None:
        atoms = count_for(posterior, adaptive.most)
        adaptive = Adaptive(most=atoms, least=max(2, atoms))

    def source(rows: list[int], draws: range) -> Tensor:
        which = Draws(
            len(draws),
            seed,
            max_tokens=max_tokens,
            first=draws.start,
            shared_prefix=shared_prefix,
            bf16=bf16,
        )
        title = f"predict, draws {draws.start + 1} to {draws.stop}" if progress else None
        chosen = [encoded[row] for row in rows]
        return row_logits(posterior, scorer, chosen, which, batch_size=batch_size, progress=title)

    return in_rounds(source, len(encoded), adaptive)
