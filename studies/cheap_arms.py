"""The arms of cheap posteriors: where their noise is, and how their draws share what has none."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from bayestune.adapters import (
    GaussianLinear,
    Slots,
    base_of,
    bayesify,
    drawn,
    evaluating,
    group_rows,
)
from bayestune.data import Task
from bayestune.forward import Draws
from bayestune.forward.kept_tokens import cache_argument
from bayestune.models import LoadedModel
from bayestune.posteriors import Gaussian
from bayestune.scoring import LetterScorer, Scorer
from studies.calibration_cost import block_of

Batch = Mapping[str, Tensor]


class LastTokens(GaussianLinear):
    """A Gaussian layer with noise on the last tokens of each row alone; its class is put in."""

    last: int

    def forward(self, input: Tensor) -> Tensor:
        """Maps (N, T, k) to (N, T, r)."""
        if not self.training:
            return super().forward(input)
        start = linear(input[:, : -self.last], self.weight)
        return torch.cat([start, super().forward(input[:, -self.last :])], 1)


@dataclass
class TailScorer(LetterScorer):
    """Letter scoring with the adapter on the last tokens alone: the base reads what is before."""

    last: int = 1

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Class logits (N, C)."""
        return self.tail(model, batch, self.known(model, batch))

    @torch.no_grad()
    def known(self, model: Any, batch: Batch) -> Any:
        """The base's keys and values of all but the last tokens."""
        parts = ("input_ids", "attention_mask", "position_ids")
        start = {name: batch[name][:, : -self.last] for name in parts}
        with model.disable_adapter():
            output = model(**start, use_cache=True, logits_to_keep=1)
        return output[self._cache(model)]

    def tail(self, model: nn.Module, batch: Batch, known: Any) -> Tensor:
        """Class logits (N, C) of rows whose prefix is known."""
        group_rows(model, 1)
        inputs = {name: batch[name][:, -self.last :] for name in ("input_ids", "position_ids")}
        inputs |= {"attention_mask": batch["attention_mask"], self._cache(model): known}
        output = model(**inputs, use_cache=True, logits_to_keep=1)
        mask = batch["option_mask"]
        logits = output.logits[:, -1, self.tokens[: mask.shape[1]]]
        return logits.float().masked_fill(~mask, -torch.inf)

    def _cache(self, model: nn.Module) -> str:
        """What transformers calls keys and values."""
        name = cache_argument(base_of(model))
        assert name is not None, "not a causal language model"
        return name


@dataclass
class Antithetic(Gaussian):
    """A Gaussian whose draws 2i and 2i + 1 have the noises E and −E."""

    def draw(self, index: int, seed: int = 0) -> dict[str, Tensor]:
        """One of the two draws of a noise."""
        weights = super().draw(index // 2, seed)
        if index % 2 == 0:
            return weights
        layers = self.layers()
        means = {name: layers[name].weight.detach().float().cpu() for name in weights}
        return {name: 2 * means[name] - weight for name, weight in weights.items()}


@dataclass(frozen=True)
class Arm:
    """Where the noise is: a kind, and how many tokens or blocks."""

    kind: str
    size: int = 0

    @property
    def name(self) -> str:
        """In records and in the table."""
        return f"{self.kind} {self.size}" if self.size else self.kind

    def scorer(self, loaded: LoadedModel, task: Task) -> LetterScorer:
        """Which reads rows as the arm does."""
        if self.kind == "adapter":
            return TailScorer(loaded.tokenizer, task, last=self.size)
        return LetterScorer(loaded.tokenizer, task)

    def prepare(self, model: nn.Module) -> None:
        """Makes A Gaussian where the arm has noise."""
        names = Slots(model).names()
        if self.kind == "blocks":
            blocks: int = base_of(model).config.num_hidden_layers  # type: ignore[assignment]
            names = [name for name in names if block_of(name) >= blocks - self.size]
        bayesify(model, slots=names)
        if self.kind == "tokens":
            for layer in Slots(model).of_kind(GaussianLinear).values():
                layer.__class__ = LastTokens
                layer.fused = None  # the layers' shared input holds all tokens
                layer.ranks = slice(None)
                layer.last = self.size  # type: ignore[assignment]

    def posterior(self, model: nn.Module, scorer: Scorer) -> Gaussian:
        """What the model and the scorer make."""
        kind = AtTheEnd if self.kind == "adapter" else Gaussian
        return kind(model, scorer)

    def draws(self, count: int) -> Draws:
        """S of its draws; 0 for the mean."""
        prefix = self.size if self.kind == "tokens" else None
        return Draws(count, shared_prefix=prefix, bf16=True)


@dataclass
class AtTheEnd(Gaussian):
    """Adapters on the last tokens alone: the base reads what is before once for all draws."""

    @torch.no_grad()
    def logits(self, inputs: Batch, draws: Draws) -> Tensor:
        """Class logits (S, N, C); the mean's for a count of 0."""
        scorer: Any = self.scorer
        with draws.precision(self.model), evaluating(self.model):
            known = scorer.known(self.model, inputs)
            if not draws.count:
                return scorer.tail(self.model, inputs, known)[None]
            weights = [self.draw(index, draws.seed) for index in draws.indices]
            stacks = {name: torch.stack([one[name] for one in weights]) for name in weights[0]}
            rows = torch.arange(len(inputs["input_ids"])).repeat(draws.count)
            known.batch_select_indices(rows)
            repeated = {name: value[rows] for name, value in inputs.items()}
            with drawn(self.model, stacks):
                logits = scorer.tail(self.model, repeated, known)
        return logits.unflatten(0, (draws.count, -1))


ARMS = (
    Arm("full"),
    *(Arm("tokens", m) for m in (1, 4, 8)),
    *(Arm("blocks", k) for k in (1, 2, 4)),
    *(Arm("adapter", m) for m in (1, 4, 8)),
)
