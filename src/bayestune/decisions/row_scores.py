"""Scores to rank rows by: numbers that are large where the draws are less sure of their choice.

Draws p_s(c), s = 1…S; average p̄; choice ĉ = argmax p̄. All are computed from logits (S, N, C) in
float64; entropies are in nats. Rows are compared by one score at a time, so its scale is free.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.special import entr

from bayestune.decisions.tempering import check_draws
from bayestune.errors import Refusal

# One draw is enough for these; those over draws are constant, or add nothing, for a single one.
ONE_PASS = ("one_minus_confidence", "negative_margin", "total_entropy")
OVER_DRAWS = (
    "expected_entropy",
    "corrected_mutual_information",
    "variation",
    "credal_entropy",
    "credal_width",
)
ROW_SCORES = ONE_PASS + OVER_DRAWS


def mutual_information(total: Tensor, expected: Tensor, draws: int | Tensor) -> Tensor:
    """(H[mean of p_s] − mean of H[p_s])·S/(S − 1) in nats, at least 0; S = 1 has no factor.

    The entropy of the average of S draws is low by about 1/S of what the draws disagree on, because
    the average follows the draws. The factor makes up for it to first order, so it can lie above
    log C on a single row; total and expected entropy stay as they are.

    Args:
        total: entropy of the averaged probabilities, (N,).
        expected: mean entropy of the draws' probabilities, (N,).
        draws: S, or each row's own number of draws, (N,).
    """
    count = torch.as_tensor(draws, dtype=torch.float64)
    factor = count / (count - 1).clamp_min(1)
    return (total - expected).clamp_min(0) * factor


@dataclass(frozen=True, eq=False)
class Spread:
    """The draws' probabilities and what scores are made of.

    Args:
        draws: p (S, N, C).
        mean: p̄ (N, C).
    """

    draws: Tensor
    mean: Tensor

    @classmethod
    def of(cls, logits: Tensor, temperature: float = 1.0) -> "Spread":
        """The spread of logits (S, N, C) at a temperature; -inf marks options a row lacks."""
        check_draws(logits)
        draws = (logits.double() / temperature).softmax(-1)
        return cls(draws, draws.mean(0))

    @property
    def choice(self) -> Tensor:
        """ĉ, the first of equals, (N,)."""
        return self.mean.argmax(-1)

    @property
    def confidence(self) -> Tensor:
        """max_c p̄(c), (N,)."""
        return self.mean.amax(-1)

    def one_minus_confidence(self) -> Tensor:
        """1 − p̄(ĉ)."""
        return 1 - self.confidence

    def negative_margin(self) -> Tensor:
        """p̄ of the second option less p̄ of the first, in [−1, 0]."""
        first, second = self.mean.topk(2, -1).values.unbind(-1)
        return second - first

    def total_entropy(self) -> Tensor:
        """H[p̄]."""
        return entr(self.mean).sum(-1)

    def expected_entropy(self) -> Tensor:
        """(1/S) Σ_s H[p_s], what more draws cannot resolve."""
        return entr(self.draws).sum(-1).mean(0)

    def mutual_information(self) -> Tensor:
        """H[p̄] − (1/S) Σ_s H[p_s], in [0, log S]."""
        return mutual_information(self.total_entropy(), self.expected_entropy(), 1)

    def corrected_mutual_information(self) -> Tensor:
        """S/(S − 1) times the mutual information; 0 for one draw.

        Estimated from S draws, the plain one is on average about (S − 1)/S of its limit for many
        draws. Corrected, it can be compared between rows with different numbers of draws; only the
        plain one and the expected entropy add up to the total entropy.
        """
        entropies = (self.total_entropy(), self.expected_entropy())
        return mutual_information(*entropies, len(self.draws))

    def variation(self) -> Tensor:
        """Variance over draws of p_s(ĉ), with S − 1 in the denominator; 0 for one draw."""
        index = self.choice.expand(len(self.draws), -1)[..., None]
        own = self.draws.gather(-1, index)[..., 0]
        return own.var(0) if len(own) > 1 else torch.zeros_like(own[0])

    def credal_width(self) -> Tensor:
        """Σ_c (max_s p_s(c) − min_s p_s(c)), the width of the probability intervals."""
        return (self.draws.amax(0) - self.draws.amin(0)).sum(-1)

    def intersection(self) -> Tensor:
        """The intersection probability of the intervals, (N, C).

        p̂ = p̲ + a (p̿ − p̲), a = (1 − Σ p̲)/Σ (p̿ − p̲), and p̄ where all draws agree: the one
        distribution that lies at the same share of each option's interval.

        Reference: Cuzzolin (2022), https://arxiv.org/abs/2201.01729
        """
        low = self.draws.amin(0)
        span = self.draws.amax(0) - low
        width = span.sum(-1, keepdim=True)
        share = ((1 - low.sum(-1, keepdim=True)) / width).clamp(0, 1)
        return torch.where(width > 1e-12, low + share * span, self.mean)

    def credal_entropy(self) -> Tensor:
        """H[p̂] of the intersection probability p̂.

        Reference: Credal LLMs, https://arxiv.org/abs/2608.23244
        """
        return entr(self.intersection()).sum(-1)


def score_rows(
    logits: Tensor, names: Collection[str] = ROW_SCORES, temperature: float = 1.0
) -> dict[str, Tensor]:
    """Scores of N rows from S draws, each (N,), larger where less sure.

    Args:
        logits: (S, N, C), -inf where a row has fewer options.
        names: some of `ROW_SCORES`.
        temperature: T, by which the logits are divided first.

    Raises:
        Refusal: on an unknown name, one class, or what is not logits.

    >>> disagree = torch.tensor([[[30.0, 0.0]], [[0.0, 30.0]]])
    >>> {name: round(s.item(), 3) for name, s in score_rows(disagree).items()}
    {'one_minus_confidence': 0.5, 'negative_margin': 0.0, 'total_entropy': 0.693,
     'expected_entropy': 0.0, 'corrected_mutual_information': 1.386, 'variation': 0.5,
     'credal_entropy': 0.693, 'credal_width': 2.0}
    """
    unknown = set(names) - set(ROW_SCORES)
    if unknown:
        raise Refusal(f"got score {min(unknown)!r}; expected one of {ROW_SCORES}; choose one")
    spread = Spread.of(logits, temperature)
    if logits.shape[-1] < 2:
        raise Refusal("got rows of one option; expected two or more; there is nothing to choose")
    return {name: getattr(spread, name)() for name in names}
