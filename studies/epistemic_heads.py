"""Heads that tell the disagreement of a teacher's draws from its student's one pass.

A head predicts the mutual information I of the draws, in nats, from features x of the pass:

* "least squares": log(I + ε) = w·x + b, with a ridge penalty;
* "Dirichlet": the draws' probabilities are Dirichlet(α₀ p) with the student's p and
  log α₀ = w·x + b, by penalised maximum likelihood; then I is that of the Dirichlet,
  H(p) − ψ(α₀ + 1) + Σ_c p_c ψ(α₀ p_c + 1).

The features are what the student's probabilities say (entropy, confidence, margin), or these and
the activations of its adapter. The penalty is chosen by five-fold cross-validation on the rows
that a head is fitted on.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayestune.decisions import ONE_PASS, Spread, score_rows

PARTS = ("fitted", "judged")
PENALTIES = (1.0, 10.0, 100.0, 1e3, 1e4)  # in rows, on standardised features
FOLDS = 5
SMOOTHED = 0.01  # how much of a uniform distribution is mixed in, so that no logarithm is infinite
FLOOR = 1e-3  # ε, nats
Fit = Callable[[Tensor, "Part", float], Tensor]  # features (N, k), rows, penalty → weights (k,)


@dataclass(frozen=True, eq=False)
class Part:
    """What teacher and student say of N rows.

    Args:
        draws: the teacher's logits (S, N, C), -inf where a row has fewer options.
        logits: the student's (N, C).
        activations: of the student's adapter at the answer, (N, k).
        labels: (N,).
    """

    draws: Tensor
    logits: Tensor
    activations: Tensor
    labels: Tensor

    @property
    def information(self) -> Tensor:
        """I (N,), as `predict` says it: S/(S − 1) times total less expected entropy."""
        return Spread.of(self.draws).corrected_mutual_information()

    @property
    def smoothed(self) -> tuple[Tensor, Tensor, Tensor]:
        """p (N, C) and the draws' π (S, N, C), mixed with a uniform one, and which options are."""
        present = self.logits > -torch.inf
        rest = SMOOTHED * present / present.sum(-1, keepdim=True)
        mean = (1 - SMOOTHED) * self.logits.double().softmax(-1) + rest
        draws = (1 - SMOOTHED) * self.draws.double().softmax(-1) + rest
        return mean, draws, present

    def rows(self, chosen: Tensor) -> "Part":
        """Some of the rows."""
        own = (self.logits, self.activations, self.labels)
        return Part(self.draws[:, chosen], *(values[chosen] for values in own))


@dataclass(frozen=True, eq=False)
class Collected:
    """One student and its teacher, on the rows for heads and on others."""

    facts: Mapping[str, Any]
    fitted: Part
    judged: Part


# Features


def probabilities_of(part: Part) -> Tensor:
    """What the student's probabilities say: the one-pass scores, (N, 3)."""
    scores = score_rows(part.logits[None], ONE_PASS)
    return torch.stack([scores[name] for name in ONE_PASS], 1)


def with_activations(part: Part) -> Tensor:
    """The same, and the activations of the student's adapter."""
    return torch.cat([probabilities_of(part), part.activations.double()], 1)


FEATURES = {"probabilities": probabilities_of, "and activations": with_activations}


# Heads: their weights (k,), the last one of the constant, and what they predict


def least_squares(x: Tensor, part: Part, penalty: float) -> Tensor:
    """Weights of log(I + ε) on features (N, k), penalised but for the constant's."""
    target = (part.information + FLOOR).log()
    return torch.linalg.solve(x.T @ x + penalties(x, penalty).diag(), x.T @ target)


def dirichlet(x: Tensor, part: Part, penalty: float) -> Tensor:
    """Weights of log α₀ by penalised maximum likelihood, from α₀ = C at every row."""
    weights = torch.zeros(x.shape[1], dtype=torch.float64)
    weights[-1] = float((part.logits > -torch.inf).sum(-1).double().mean().log())
    weights.requires_grad_()
    search = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")
    own = penalties(x, penalty)

    def loss() -> Tensor:
        search.zero_grad()
        value = -log_likelihood(x @ weights, part).sum() + (own * weights.square()).sum() / 2
        value.backward()
        return value

    search.step(loss)  # type: ignore[arg-type]  # a closure may give a tensor
    return weights.detach()


def penalties(x: Tensor, penalty: float) -> Tensor:
    """Of each weight (k,): none of the constant's."""
    own = torch.full((x.shape[1],), penalty, dtype=torch.float64)
    own[-1] = 1e-9
    return own


def log_likelihood(log_total: Tensor, part: Part) -> Tensor:
    """Mean over draws of log Dirichlet(π_s; α₀ p), (N,), of log α₀ (N,)."""
    mean, draws, present = part.smoothed
    alpha = torch.where(present, log_total.exp()[:, None] * mean, 1.0)
    logs = torch.where(present, draws, 1.0).log().mean(0)  # 0 of an option that a row has not
    terms = (alpha - 1) * logs - torch.lgamma(alpha)
    return torch.lgamma(log_total.exp()) + torch.where(present, terms, 0.0).sum(-1)


def information_of(log_total: Tensor, part: Part) -> Tensor:
    """I of Dirichlet(α₀ p) in nats, (N,)."""
    mean, _, _ = part.smoothed
    total = log_total.exp()
    inner = (mean * torch.digamma(total[:, None] * mean + 1)).sum(-1)
    return torch.special.entr(mean).sum(-1) - torch.digamma(total + 1) + inner


@dataclass(frozen=True)
class Head:
    """How a head is fitted, what its output says of I, and how well it fits rows, higher better."""

    fit: Fit
    predicted: Callable[[Tensor, Part], Tensor]
    quality: Callable[[Tensor, Part], Tensor]


HEADS = {
    "least squares": Head(
        least_squares,
        lambda output, _: output.exp() - FLOOR,
        lambda output, part: -(output - (part.information + FLOOR).log()).square(),
    ),
    "Dirichlet": Head(dirichlet, information_of, log_likelihood),
}


def predicted(
    head: Head, features: Callable[[Part], Tensor], found: Collected
) -> tuple[Tensor, float]:
    """I of the judged rows (N,), and the penalty that cross-validation chose."""
    x, new = standardised(features(found.fitted), features(found.judged))
    penalty = max(PENALTIES, key=lambda value: cross_validated(head, x, found.fitted, value))
    weights = head.fit(x, found.fitted, penalty)
    return head.predicted(new @ weights, found.judged), penalty


def cross_validated(head: Head, x: Tensor, part: Part, penalty: float) -> float:
    """The mean quality of rows by weights from the other folds."""
    fold = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)) % FOLDS
    total = 0.0
    for index in range(FOLDS):
        own = fold == index
        weights = head.fit(x[~own], part.rows(~own), penalty)
        total += head.quality(x[own] @ weights, part.rows(own)).sum().item()
    return total / len(x)


def standardised(fitted: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Features with mean 0 and variance 1 on the fitted rows, and a constant."""
    mean = fitted.mean(0)
    std = fitted.std(0).clamp_min(1e-9)
    constant = torch.ones(len(fitted), 1, dtype=torch.float64)
    old = torch.cat([(fitted - mean) / std, constant], 1)
    return old, torch.cat([(new - mean) / std, torch.ones(len(new), 1, dtype=torch.float64)], 1)
