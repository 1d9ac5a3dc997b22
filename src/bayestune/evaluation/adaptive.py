"""Adaptive draws: no more draws for rows whose decision is certain."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from bayestune.data import Question
from bayestune.decisions import check_draws, mutual_information
from bayestune.errors import Refusal
from bayestune.forward import Draws
from bayestune.posteriors import Posterior, Prediction, refuse_one_class
from bayestune.scoring import Scorer, row_logits

# Maps numbers of rows and indices of draws to the logits (S, N, C) of these alone.
Source = Callable[[list[int], range], Tensor]
_ROUNDING = 1e-9  # more than float64 loses in the sums of any number of draws


@dataclass(frozen=True)
class Adaptive:
    """Stops drawing for a row when its decision is certain to be that of all S draws.

    After n draws the leader leads by n·(p₁ − p₂) in summed probability, and each draw to come takes
    at most 1 from it, so the leader stays while n·(p₁ − p₂) > S − n: never before S/2 draws.
    A row that stops keeps the mean of its first n draws, slightly biased because n depends on them.
    Its mutual information is corrected for its own n, so that rows of different n can be ranked.

    Args:
        most: S, the largest number of draws of a row.
        round_size: draws between two checks; with a shared prefix each round reads it again.
    """

    most: int = 10
    round_size: int = 2

    def __post_init__(self) -> None:
        if self.most < 1 or self.round_size < 1:
            raise Refusal(
                f"too few draws: got most={self.most}, round_size={self.round_size}, expected 1 or "
                "more of each; the mean (0) needs no rounds"
            )

    def rounds(self) -> Iterator[range]:
        """The draws of each round; the first one ends where a row can first be decided.

        Example:
            >>> list(Adaptive(most=9, round_size=3).rounds())
            [range(0, 5), range(5, 8), range(8, 9)]
        """
        first = 0
        end = self.most // 2 + 1
        while first < end:
            yield range(first, end)
            first = end
            end = min(end + self.round_size, self.most)

    def decided(self, means: Tensor, count: int) -> Tensor:
        """Which rows (N,) no further draw can change, by probabilities (N, C) of `count` draws."""
        first, second = pad(means, (0, 1)).topk(2).values.unbind(-1)
        return count * (first - second) > self.most - count + _ROUNDING


@dataclass(frozen=True)
class AdaptivePrediction(Prediction):
    """A prediction whose averages are over each row's own number of draws, `draws_used` (N,)."""

    draws_used: Tensor

    @classmethod
    def of(cls, logits: Tensor, *, exact: bool = False) -> Self:
        """The prediction of logits (S, N, C): all draws for every row."""
        used = torch.full((logits.shape[1],), len(logits))
        return cls(**vars(Prediction.of(logits, exact=exact)), draws_used=used)


def in_rounds(source: Source, num_rows: int, adaptive: Adaptive) -> AdaptivePrediction:
    """Draws in rounds from any source of logits, such as saved draws.

    Args:
        source: gives the logits of some rows under some draws.
        num_rows: N.
        adaptive: how many draws at most, and when to look.

    Example:
        >>> agreed, mixed = [[9.0, 0.0]] * 6, [[9.0, 0.0], [0.0, 9.0]] * 3
        >>> logits = torch.tensor([agreed, mixed]).transpose(0, 1)
        >>> saved = lambda rows, draws: logits[draws.start : draws.stop, rows]
        >>> in_rounds(saved, 2, Adaptive(most=6)).draws_used.tolist()
        [4, 6]
    """
    if num_rows < 1:
        raise Refusal("nothing to predict: got no rows, expected one or more")
    rows = torch.arange(num_rows)
    used = torch.zeros(num_rows, dtype=torch.long)
    log_drawn = torch.empty(0)  # log-probabilities (S, N, C); −inf of draws that are not taken
    for indices in adaptive.rounds():
        logits = source(rows.tolist(), indices).cpu()
        if indices.start == 0:  # of all rows, so that C is that of the widest
            shape = (adaptive.most, num_rows, logits.shape[-1])
            log_drawn = torch.full(shape, -torch.inf, dtype=torch.float64)
        logs = logits.double().log_softmax(-1)
        log_drawn[indices.start : indices.stop, rows, : logits.shape[-1]] = logs
        used[rows] = indices.stop
        means_so_far = log_drawn[: indices.stop, rows].exp().mean(0)
        rows = rows[~adaptive.decided(means_so_far, indices.stop)]
        if not len(rows):
            break
    log_means = log_drawn.logsumexp(0) - used[:, None].log()
    drawn = log_drawn.exp()
    means = drawn.sum(0) / used[:, None]
    total = torch.special.entr(means).sum(-1)
    expected = torch.special.entr(drawn).sum((0, -1)) / used
    information = mutual_information(total, expected, used)
    return AdaptivePrediction(
        means, total, expected, information, used, log_probabilities=log_means
    )


def predict_adaptively(
    posterior: Posterior,
    scorer: Scorer,
    questions: Sequence[Question],
    adaptive: Adaptive,
    *,
    draws: Draws | None = None,
    progress: bool = False,
) -> AdaptivePrediction:
    """The predictive of all questions, without further draws for those whose decision is certain.

    After each round the undecided rows are batched anew, by length.

    Args:
        posterior: one with `atoms` is averaged over all of them, for every row.
        scorer: encodes the questions and gives their class logits (N, C).
        questions: N rows.
        adaptive: how many draws at most, and when to look.
        draws: the seed, the bounds of a pass and its precision; its `count` is not used.
        progress: whether each round shows a progress bar.

    Returns:
        The prediction, with the number of draws of each row in `draws_used` (N,).

    Raises:
        Refusal: if a question cannot be put, or has a single option.
    """
    encoded = scorer.encode(questions)

    def source(rows: list[int], indices: range) -> Tensor:
        of_round = replace(draws or Draws(), first=indices.start, count=len(indices))
        title = f"predict, draws {indices.start + 1} to {indices.stop}" if progress else None
        chosen = [encoded[row] for row in rows]
        logits = row_logits(posterior, scorer, chosen, of_round, progress=title)
        check_draws(logits)
        if indices.start == 0:  # of all rows
            refuse_one_class(logits)
        return logits

    if posterior.atoms is None:
        return in_rounds(source, len(encoded), adaptive)
    every = list(range(len(encoded)))
    return AdaptivePrediction.of(source(every, range(posterior.atoms)), exact=True)
