"""The predictive: probabilities averaged over draws, and the uncertainty of each row."""

import math
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from bayestune.decisions import mutual_information
from bayestune.errors import Refusal
from bayestune.forward import Batch, Draws
from bayestune.posteriors.posterior import Posterior


@dataclass(frozen=True)
class Prediction:
    """Averaged probabilities and the uncertainty of each row; entropies in nats.

    Args:
        probabilities: mean over draws of softmax(logits), (N, C).
        total_entropy: entropy of the averaged probabilities, (N,).
        expected_entropy: mean entropy of the draws' probabilities (aleatoric), (N,).
        mutual_information: their difference (epistemic) times S/(S − 1), (N,); 0 for one draw. Of
            S draws the difference is low by (S − 1)/S, so without the factor five draws would not
            compare with ten. Where the draws are all there is (`atoms`), there is no factor.
        log_probabilities: logarithms of `probabilities`, (N, C), also where those are rounded to 0;
            None if they are not known.
        drawn: the probabilities of each draw, (S, N, C); None if they are not kept.
    """

    probabilities: Tensor
    total_entropy: Tensor
    expected_entropy: Tensor
    mutual_information: Tensor
    log_probabilities: Tensor | None = field(default=None, kw_only=True)
    drawn: Tensor | None = field(default=None, kw_only=True)

    @property
    def confidence(self) -> Tensor:
        """The largest probability of each row, (N,)."""
        return self.probabilities.amax(-1)

    @property
    def choice(self) -> Tensor:
        """The index of the largest probability of each row, (N,)."""
        return self.probabilities.argmax(-1)

    @classmethod
    def of(cls, logits: Tensor, *, exact: bool = False) -> Self:
        """The predictive of logits (S, N, C), in float64; -inf marks options a row does not have.

        Args:
            logits: of S draws.
            exact: whether the draws are all there is, such as the members of an ensemble, and not a
                sample.

        Raises:
            Refusal: if there is a single class, whose probability would be 1 whatever its logit is.

        Example:
            >>> two_sure_draws_that_disagree = torch.tensor([[[30.0, 0.0]], [[0.0, 30.0]]])
            >>> prediction = Prediction.of(two_sure_draws_that_disagree, exact=True)
            >>> prediction.probabilities.tolist(), round(prediction.mutual_information.item(), 4)
            ([[0.5, 0.5]], 0.6931)
        """
        refuse_one_class(logits)
        logs = logits.double().log_softmax(-1)
        draws = logs.exp()
        probabilities = draws.mean(0)
        total = torch.special.entr(probabilities).sum(-1)
        expected = torch.special.entr(draws).sum(-1).mean(0)
        information = mutual_information(total, expected, 1 if exact else len(logits))
        known = logs.logsumexp(0) - math.log(len(logits))
        more = {"log_probabilities": known, "drawn": draws}
        return cls(probabilities, total, expected, information, **more)


def refuse_one_class(logits: Tensor) -> None:
    """Refuses logits (…, C) of a single class.

    Raises:
        Refusal: if C is 1.
    """
    if logits.shape[-1] == 1:
        raise Refusal(
            "one logit has no probabilities of classes: got logits of shape "
            f"{tuple(logits.shape)}, expected two classes or more; use num_labels=2 for a yes or "
            "no, or take `posterior.logits` as they are, such as for regression"
        )


def count_for(posterior: Posterior, draws: int) -> int:
    """How many draws to take where so many are asked for: the posterior's `atoms` if it has some.

    Raises:
        Refusal: if the mean is asked for, by 0, and there is none.
    """
    if draws == 0 and not posterior.has_mean:
        raise Refusal(
            f"{type(posterior).__name__} has no mean: got draws=0, which asks for it, "
            "expected 1 or more"
        )
    return draws if posterior.atoms is None or draws == 0 else posterior.atoms


def predict(
    posterior: Posterior,
    inputs: Batch,
    draws: int | Draws = 10,
    *,
    seed: int = 0,
    max_tokens: int = 16384,
    shared_prefix: int | None = None,
) -> Prediction:
    """Averages the probabilities of held draws: p(y | x) ≈ 1/S Σ_s softmax(f(x; A_s)).

    Args:
        posterior: what a method's `fit` returned, or a loaded one.
        inputs: a batch of N rows, as its scorer collates them.
        draws: S; 0 for the mean adapter. A posterior with `atoms` is averaged over those instead. A
            `Draws` says all of what follows too.
        seed: of the set of draws; the same seed gives the same S functions for every batch.
        max_tokens: bound on the tokens of one forward pass.
        shared_prefix: m; an approximation, off by default: the mean adapter reads all but the last
            m tokens of the prompt, once for all draws. docs/calibration_cost.md shows what is lost.

    Raises:
        Refusal: if `draws` is negative, or 0 for a posterior without a mean, or a prefix cannot
            be shared.
    """
    if not isinstance(draws, Draws):
        draws = Draws(draws, seed, max_tokens=max_tokens, shared_prefix=shared_prefix)
    draws = replace(draws, count=count_for(posterior, draws.count))
    exact = posterior.atoms is not None
    return Prediction.of(posterior.logits(inputs, draws), exact=exact)
