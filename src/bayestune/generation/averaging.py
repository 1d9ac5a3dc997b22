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
    """Stands in for all processors: averages the draws, processes the average, chooses a token.

    The average is scaled like one model's logits, log p̄ + mean_s logsumexp f_s, because penalties
    look at the sign. It is processed for N rows, as if there were one model. For each of the S·N
    rows the loop is then left the chosen token alone.

    Args:
        processors: transformers' own for the options that were given, and the caller's.
        num_draws: S; 1 where every row writes a text of its own.
        temperature: of the posterior.
        exact: whether these draws are all that the posterior has.
        noise: the generator to sample with; None to take the most probable token.
    """

    processors: LogitsProcessorList
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
        processed = self.processors(input_ids[: len(averaged)], averaged)  # type: ignore[arg-type]
        chosen = self._choose(processed)[:, None]
        uncertainty = {name: getattr(prediction, name) for name in FIGURES[1:]}
        self.steps.append({"log_probabilities": logs.gather(1, chosen)[:, 0], **uncertainty})
        chosen_alone = torch.full_like(processed, -torch.inf).scatter(1, chosen, 0.0)
        return chosen_alone.repeat(self.num_draws, 1)

    def _choose(self, scores: Tensor) -> Tensor:
        """One token for each row, (N,)."""
        if self.noise is None:
            return scores.argmax(-1)
        return torch.multinomial(scores.softmax(-1), 1, generator=self.noise)[:, 0]

    def figures(self, mask: Tensor) -> dict[str, Tensor]:
        """The `FIGURES` of all steps by name, (N, T), 0 outside of a mask (N, T)."""
        figures = {}
        for name in FIGURES:
            values = torch.stack([step[name] for step in self.steps[: mask.shape[1]]], 1)
            figures[name] = values.masked_fill(~mask.to(values.device), 0.0)
        return figures


class Ends(StoppingCriteriaList):
    """Stopping criteria that remember which rows had not ended before each token, in `open`."""

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
