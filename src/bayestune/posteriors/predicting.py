"""predict: a posterior's draws on rows → a prediction with its uncertainty."""

from dataclasses import replace
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from bayestune.errors import Refusal
from bayestune.forward import Batch, Draws
from bayestune.posteriors.given_rows import GivenRows, batches_of
from bayestune.posteriors.likelihoods import LIKELIHOODS, Likelihood
from bayestune.posteriors.posterior import Posterior
from bayestune.posteriors.prediction import Prediction

P = TypeVar("P")


def count_for(posterior: Posterior, draws: int) -> int:
    """How many draws to take: the posterior's `atoms` if their number is fixed, else as requested.

    Args:
        posterior: whose draws.
        draws: S as requested; 0 for the mean adapter.

    Raises:
        Refusal: if the mean is requested and there is none.
    """
    if draws == 0 and not posterior.has_mean:
        raise Refusal(
            f"{type(posterior).__name__} has no mean: got draws=0, which asks for it, "
            "expected 1 or more"
        )
    return draws if posterior.atoms is None or draws == 0 else posterior.atoms


@overload
def predict(
    posterior: Posterior,
    inputs: Batch | GivenRows,
    draws: int | Draws = ...,
    *,
    likelihood: Literal["softmax"] = ...,
    seed: int = ...,
    **bounds: Any,
) -> Prediction: ...


@overload
def predict(
    posterior: Posterior,
    inputs: Batch | GivenRows,
    draws: int | Draws = ...,
    *,
    likelihood: Likelihood[P],
    seed: int = ...,
    **bounds: Any,
) -> P: ...


@overload
def predict(
    posterior: Posterior,
    inputs: Batch | GivenRows,
    draws: int | Draws = ...,
    *,
    likelihood: str,
    seed: int = ...,
    **bounds: Any,
) -> Any: ...


def predict(
    posterior: Posterior,
    inputs: Batch | GivenRows,
    draws: int | Draws = 10,
    *,
    likelihood: str | Likelihood[Any] = "softmax",
    seed: int = 0,
    **bounds: Any,
) -> Any:
    """Averages the predictions of held draws: p(y | x) ≈ 1/S Σ_s p(y | f(x; A_s)).

    Args:
        posterior: what a method's `fit` returned, or a loaded one.
        inputs: a batch of N rows as its scorer takes it; or a DataLoader of such batches; or a
            Dataset of tokenised rows, as a Trainer takes it.
        draws: S; 0 for the mean adapter. A posterior with `atoms` is averaged over those instead. A
            `Draws` takes the place of `seed` and `bounds` too.
        likelihood: what the logits are: "softmax" (classes, of rows or of tokens), "sigmoid"
            (labels, of which a row has several), "regression", "reward"; or an object, such as
            `Regression(noise_var=0.3)`.
        seed: of the set of draws; the same seed gives the same S functions for every batch.
        bounds: other fields of `Draws`: max_tokens bounds the tokens of one forward pass;
            shared_prefix=m is an approximation, off by default: the mean adapter reads all but the
            last m tokens of the prompt, once for all draws. docs/calibration_cost.md shows what is
            lost.

    Returns:
        A `Prediction`; of the other likelihoods `LabelPrediction`, `RegressionPrediction` or
        `RewardPrediction`.

    Raises:
        Refusal: if `draws` is negative, or 0 for a posterior without a mean, or a prefix cannot
            be shared, or the likelihood is unknown or does not fit the logits.
    """
    chosen = _likelihood(likelihood)
    if not isinstance(draws, Draws):
        draws = Draws(draws, seed, **bounds)
    draws = replace(draws, count=count_for(posterior, draws.count))
    parts = [posterior.logits(batch, draws) for batch in batches_of(inputs, posterior)]
    return chosen.predictive(_joined(parts), exact=posterior.atoms is not None)


def _likelihood(given: str | Likelihood[Any]) -> Likelihood[Any]:
    if not isinstance(given, str | type):
        return given
    if given not in LIKELIHOODS:
        raise Refusal(
            f"unknown likelihood: got {given!r}, expected one of {', '.join(LIKELIHOODS)}; choose "
            "one, or give an object"
        )
    return LIKELIHOODS[given]


def _joined(parts: list[Tensor]) -> Tensor:
    """The logits of several batches, (S, N, …): those of fewer tokens or options end in -inf."""
    if len(parts) == 1:
        return parts[0]
    if not parts:
        raise Refusal("got no rows, expected one or more; give a batch, or a loader that has some")
    shapes = [part.shape[2:] for part in parts]
    largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    padded = []
    for part in parts:
        padding: list[int] = []  # before and after, from the last axis to the first: F.pad's order
        for full, size in zip(reversed(largest), reversed(part.shape[2:]), strict=True):
            padding += [0, full - size]
        padded.append(F.pad(part, padding, value=-torch.inf))
    return torch.cat(padded, 1)
