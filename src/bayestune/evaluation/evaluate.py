"""A posterior and rows → the predictive of every row, for each number of draws."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from bayestune.data import Question
from bayestune.decisions import check_draws
from bayestune.errors import COUNT, NUMBER, Refusal, check_fields
from bayestune.forward import Draws
from bayestune.posteriors import Posterior, Prediction, count_for
from bayestune.scoring import Scorer, shared_row_logits

DRAWS_KEPT = 32  # of each row, in its file: as many as a picture can show


@dataclass(frozen=True)
class EvaluationOptions:
    """How rows are predicted, and what their metrics are.

    Args:
        draws: numbers of draws to evaluate; 0 is the mean.
        draw_seed: which set of draws: the same seed gives the same draws.
        prediction_batch: rows that are predicted at once.
        max_tokens: tokens of one forward pass over all its draws: the memory bound.
        bins: of ECE, by confidence.
        binning: where a confidence of exactly 1 goes in ECE: "torchmetrics", as in the published
            figures, or "textbook".
        resamples: of the bootstrap behind the intervals.
        texts: whether the rows' files repeat questions and options; false if their licence forbids.
        shared_prefix: m; an approximation, off by default: the mean adapter reads all but the last
            m tokens of the prompt, once for all draws.
    """

    draws: tuple[int, ...] = (0, 5, 10)
    draw_seed: int = 0
    prediction_batch: int = 8
    max_tokens: int = 16384
    bins: int = 15
    binning: Literal["torchmetrics", "textbook"] = "torchmetrics"
    resamples: int = 1000
    texts: bool = True
    shared_prefix: int | None = field(default=None, metadata={"absent_means": None})

    def __post_init__(self) -> None:
        if not self.draws:
            raise Refusal("nothing to evaluate: got draws=[], expected such as [0, 10]")
        wrong = [count for count in self.draws if count not in NUMBER]
        if wrong or len(set(self.draws)) < len(self.draws):
            raise Refusal(
                f"EvaluationOptions.draws: got {list(self.draws)}, expected {NUMBER.said}, each "
                "once; 0 is the mean"
            )
        check_fields(self, prediction_batch=COUNT, max_tokens=COUNT, bins=COUNT, resamples=COUNT)
        check_fields(self, draw_seed=NUMBER, shared_prefix=COUNT)

    def counts(self, posterior: Posterior) -> list[int]:
        """The numbers of draws to evaluate a posterior with; one with `atoms` has only that."""
        if posterior.atoms is not None:
            return [0 if posterior.atoms == 1 else posterior.atoms]
        counts = [count for count in self.draws if count or posterior.has_mean]
        return counts or [count_for(posterior, 0)]


@dataclass(frozen=True)
class Evaluated:
    """The predictive of all rows for one number of draws."""

    draws: int  # S; 0 is the mean
    prediction: Prediction
    seconds: float  # of the pass that the draws were taken from
    timed_draws: int  # S or more: how many draws that pass had


def evaluate_posterior(
    posterior: Posterior,
    scorer: Scorer,
    questions: Sequence[Question],
    options: EvaluationOptions,
    *,
    bf16: bool = False,
    progress: bool = True,
) -> list[Evaluated]:
    """The predictive for each number of draws, the first S of the same held draws.

    One pass over the rows takes the largest number of draws, another one the mean. A posterior with
    `atoms` is evaluated once, with as many draws. Processes under a launcher share the batches.

    Args:
        posterior: whose draws.
        scorer: encodes the questions and gives their class logits (N, C).
        questions: N rows.
        options: numbers of draws, their seed, and the bounds of a pass.
        bf16: whether to predict under bfloat16 autocast.
        progress: whether each pass over the rows shows a progress bar.

    Returns:
        One for each number of draws, as `EvaluationOptions.counts` orders them.

    Raises:
        Refusal: if a question cannot be put, or a row's logits are not numbers.
    """
    rows = scorer.encode(questions)
    size = options.prediction_batch
    common = Draws(seed=options.draw_seed, max_tokens=options.max_tokens, bf16=bf16)
    counts = options.counts(posterior)
    timed = {count: max(counts) if count else 0 for count in counts}  # the draws of each one's pass
    passes: dict[int, tuple[Tensor, float]] = {}
    for num_draws in set(timed.values()):
        prefix = options.shared_prefix if num_draws and posterior.atoms is None else None
        draws = replace(common, count=num_draws, shared_prefix=prefix)
        title = f"predict, {num_draws} draws" if num_draws else "predict, mean"
        bar = title if progress else None
        begin = time.perf_counter()
        logits = shared_row_logits(posterior, scorer, rows, draws, batch_size=size, progress=bar)
        passes[num_draws] = (logits, time.perf_counter() - begin)
    evaluated = []
    for count in counts:
        logits, seconds = passes[timed[count]]
        check_draws(logits)
        exact = posterior.atoms is not None
        of_count = logits[: max(count, 1)]
        prediction = Prediction.in_parts(of_count, exact=exact, draws_kept=DRAWS_KEPT)
        evaluated.append(Evaluated(count, prediction, seconds, timed[count]))
    return evaluated
