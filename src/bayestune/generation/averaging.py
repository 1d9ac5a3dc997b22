"""One step of generation: S draws' logits → their average → one token for all draws."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from bayestune.posteriors import Prediction

FIGURES = ("log_probabilities", "total_entropy", "expected_entropy", "mutual_information")


@dataclass
class Averaging(LogitsProcessor):
    """Takes the place of all processors: averages, has them process the average, and chooses.

    The average is scaled like one model's logits, log p̄ + mean_s logsumexp f_s, because penalties
    look at the sign. It is processed for N rows, as if there were one model, and the token that is
    chosen is the only one that the loop is left for each of the S·N rows.

    Args:
        prepared: transformers' processors for the options that were given, and the caller's own.
        num_draws: S; 1 where every row goes its own way.
        temperature: of the posterior.
        exact: whether the draws are all there is.
        noise: of sampling; None to take the most probable token.
    """

    prepared: LogitsProcessorList
    num_draws: int
    temperature: float = 1.0
    exact: bool = False
    noise: torch.Generator | None = None
    steps: list[dict[str, Tensor]] = field(default_factory=list, init=False)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (S·N, V) that are 0 for the chosen token and −inf for all others."""
        logits = scores.unflatten(0, (self.num_draws, -1)) / self.temperature
        prediction = Prediction.of(logits, exact=self.exact)
        logs = prediction.log_probabilities
        assert logs is not None
        scale = logits.double().logsumexp(-1, keepdim=True).mean(0)
        averaged = (logs + scale).to(scores.dtype)
        processed = self.prepared(input_ids[: len(averaged)], averaged)  # type: ignore[arg-type]
        chosen = self._choose(processed)[:, None]
        step = {name: getattr(prediction, name) for name in FIGURES[1:]}
        self.steps.append({"log_probabilities": logs.gather(1, chosen)[:, 0], **step})
        only = torch.full_like(processed, -torch.inf).scatter(1, chosen, 0.0)
        return only.repeat(self.num_draws, 1)

    def _choose(self, scores: Tensor) -> Tensor:
        """One token for each row, (N,)."""
        if self.noise is None:
            return scores.argmax(-1)
        return torch.multinomial(scores.softmax(-1), 1, generator=self.noise)[:, 0]

    def figures(self, mask: Tensor) -> dict[str, Tensor]:
        """The figures of all steps, (N, T), 0 outside of a mask (N, T)."""
        found = {}
        for name in FIGURES:
            values = torch.stack([step[name] for step in self.steps[: mask.shape[1]]], 1)
            found[name] = values.masked_fill(~mask.to(values.device), 0.0)
        return found


class Ends(StoppingCriteriaList):
    """The criteria, and which rows had not ended before each token."""

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        super().__init__(criteria)
        self.open: list[Tensor] = []
        self._done: Tensor | None = None

    def __call__(self, input_ids: Any, scores: Any, **more: Any) -> Any:
        """Which rows have ended, (rows,)."""
        done = super().__call__(input_ids, scores, **more)
        before = torch.zeros_like(done) if self._done is None else self._done
        self.open.append(~before)
        self._done = before | done
        return done

    def mask(self, num_rows: int, length: int) -> Tensor:
        """Which of the first rows' tokens belong to their text, (N, T)."""
        return torch.stack(self.open[:length], 1)[:num_rows]
