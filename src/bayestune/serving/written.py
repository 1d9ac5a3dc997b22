"""Short answers in free words, token by token, with log-probabilities averaged over the draws."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bayestune.forward import Draws
from bayestune.posteriors import Posterior, count_for
from bayestune.scoring import NextToken
from bayestune.session import CalibratedPredictor, widened


@dataclass
class Written:
    """An answer as it grows.

    A token's probability is the average over draws, each with the weight that what stands before
    gives it: p(y_t | y_<t) = Σ_s w_s p_s(y_t | y_<t), w_s ∝ Π_i<t p_s(y_i | y_<i). So the
    logarithms of an answer's tokens sum to that of its probability, averaged over draws.

    Args:
        posterior: asked by `NextToken`.
        draws: its draws.
        ids: of the prompt and of what was written, T.
        factor: on every standard deviation of a Gaussian.
        tokens: what was written: a token, its log-probability, the likeliest ones.
    """

    posterior: Posterior
    draws: Draws
    ids: list[int]
    factor: float = 1.0
    tokens: list[dict[str, Any]] = field(default_factory=list)
    _log_weights: Tensor | None = None

    @classmethod
    def begin(cls, predictor: CalibratedPredictor, ids: list[int]) -> "Written":
        """An empty answer after a prompt, under the predictor's draws.

        Args:
            predictor: whose posterior writes.
            ids: of the prompt.
        """
        posterior = predictor.fit.posterior.on(NextToken())
        way = predictor.way
        draws = Draws(count_for(posterior, way.draws), way.draw_seed, bf16=way.bf16)
        return cls(posterior, draws, ids, way.factor)

    def step(self, most: int) -> int:
        """Writes the likeliest token and returns it; keeps the `most` likeliest beside it."""
        ids = torch.tensor([self.ids])
        places = torch.arange(len(self.ids))[None]
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": places}
        with widened(self.posterior, self.factor):
            logits = self.posterior.logits(batch, self.draws)[:, 0]
        logs = logits.double().cpu().log_softmax(-1)
        weights = self._log_weights
        if weights is None:
            weights = torch.full((len(logs),), -math.log(len(logs)), dtype=torch.float64)
        log_means = (logs + weights[:, None]).logsumexp(0)  # over draws, (vocabulary,)
        token = int(log_means.argmax())
        self._log_weights = (weights + logs[:, token]).log_softmax(0)
        top = log_means.topk(min(most, len(log_means)))
        likeliest = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        self.tokens.append({"id": token, "logprob": log_means[token].item(), "top": likeliest})
        self.ids.append(token)
        return token
