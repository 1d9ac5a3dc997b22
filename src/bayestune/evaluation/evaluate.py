"""A posterior and questions → probabilities of every row for each number of draws."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bayestune.data import Question
from bayestune.forward import Draws
from bayestune.posteriors import Posterior, Prediction
from bayestune.scoring import Scorer, row_logits


@dataclass(frozen=True)
class EvaluationOptions:
    """How a set of rows is predicted.

    Args:
        draws: numbers of draws to evaluate; 0 is the mean.
        draw_seed: of the held draws.
        prediction_batch: rows of one batch.
        max_tokens: tokens of one forward pass over all its draws: the memory bound.
        bins: of the calibration errors.
        binning: "torchmetrics" (as in the published figures) or "textbook".
        resamples: of the bootstrap.
        texts: whether the rows' files repeat questions and options; false where their licence forbids to pass them on.
        shared_prefix: m; an approximation, off by default: the mean adapter reads all but the last m tokens of the
            prompt, once for all draws. Not for the mean, and not for posteriors with `atoms`.
    """

    draws: tuple[int, ...] = (0, 5, 10)
    draw_seed: int = 0
    prediction_batch: int = 8
    max_tokens: int = 16384
    bins: int = 15
    binning: Literal["torchmetrics", "textbook"] = "torchmetrics"
    resamples: int = 1000
    texts: bool = True
    shared_prefix: int | None = None


def evaluate_posterior(
    posterior: Posterior,
    scorer: Scorer,
    questions: Sequence[Question],
    settings: EvaluationOptions,
    *,
    bf16: bool = False,
    progress: bool = True,
) -> Iterator[tuple[int, Prediction, float]]:
    """The predictive for each number of draws: the first S of the same held draws, so that more draws only add.

    Args:
        posterior: to evaluate; one with `atoms` is evaluated once, with as many draws.
        scorer: the task, bound to the tokenizer.
        questions: the rows.
        settings: draws, batch and bounds.
        bf16: bfloat16 autocast.
        progress: show progress bars.

    Yields:
        Number of draws, prediction, and the seconds that this number of draws took.
    """
    rows = scorer.encode(questions)
    exact = None if posterior.atoms is None else (0 if posterior.atoms == 1 else posterior.atoms,)
    counts = exact or tuple(count for count in settings.draws if count or posterior.has_mean)

    def logits(count: int) -> tuple[Tensor, float]:
        prefix = settings.shared_prefix if count and exact is None else None
        draws = Draws(
            count,
            settings.draw_seed,
            max_tokens=settings.max_tokens,
            shared_prefix=prefix,
            bf16=bf16,
        )
        begin = time.perf_counter()
        title = (f"predict, {count} draws" if count else "predict, mean") if progress else None
        values = row_logits(
            posterior,
            scorer,
            rows,
            draws,
            batch_size=settings.prediction_batch,
            progress=title,
        )
        return values, time.perf_counter() - begin

    most = max(counts)
    drawn, seconds = logits(most) if most else (torch.empty(0), 0.0)
    for count in counts:
        if count == 0:
            values, taken = logits(0)
            yield 0, Prediction.of(values), taken
        else:
            yield count, Prediction.of(drawn[:count]), seconds * count / most
