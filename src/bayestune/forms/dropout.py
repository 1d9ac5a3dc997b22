"""MC dropout in the paper's form: PEFT's LoRA dropout kept on at prediction, a mask for each token."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from bayestune.drawing import repeat_rows
from bayestune.lora import ADAPTER, adapted_layers, evaluating
from bayestune.posterior import Batch, Draws, Saved, Scorer, State, mean_logits, on_device, seeded


@dataclass
class Dropout:
    """Draws are passes with LoRA's dropout on: each token of each row has masks of its own, so a draw is no adapter.

    The masks come from torch's generator, seeded by (seed, the first draw of the pass): the same batches give the same
    logits, another batching other masks. For draws that are functions see `forms.scaled`.

    Args:
        model: a PEFT model with `lora_dropout` > 0.
        score: maps (model, batch) to class logits (N, C).
        fitted: what the fit reports.
        adapter: which adapter.

    Raises:
        ValueError: if the adapter has no dropout: all draws would be the mean.
    """

    kind: ClassVar[str] = "dropout"
    model: nn.Module
    score: Scorer
    fitted: Mapping[str, Any] = field(default_factory=dict, repr=False)
    adapter: str = ADAPTER
    has_mean: bool = field(default=True, init=False)
    atoms: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if not any(module.p > 0 for module in dropouts(self.model, self.adapter)):
            raise ValueError("the adapter has no dropout: got lora_dropout=0, expected more; set Lora(dropout=0.1)")

    def logits(self, inputs: Batch, draws: Draws) -> Tensor:
        """The draws' logits (S, N, C), S·N rows in one pass within the bounds of `draws`; (1, N, C) for the mean."""
        if draws.count == 0:
            return mean_logits(self, inputs)
        draws.refuse_prefix(self)
        step, chunks, inputs = draws.at_once(inputs), [], on_device(inputs, self.model)
        for start in range(0, draws.count, step):
            size = min(step, draws.count - start)
            with evaluating(self.model), self._dropping(draws.seed, draws.first + start):
                chunks.append(self.score(self.model, repeat_rows(inputs, size)).unflatten(0, (size, -1)))
        return torch.cat(chunks)

    @contextmanager
    def _dropping(self, seed: int, first: int) -> Iterator[None]:
        """Switches LoRA's dropout on, nothing else, with seeded masks; the caller's random state is kept."""
        with seeded(self.model, seed, first):
            for module in dropouts(self.model, self.adapter):
                module.train()
            yield

    def state(self) -> State:
        """Nothing: the adapter's configuration holds the dropout's probability."""
        return {}, {}

    @classmethod
    def restore(cls, saved: Saved) -> Self:  # noqa: D102
        return cls(saved.model, saved.score, adapter=saved.adapter)


def dropouts(model: nn.Module, adapter: str = ADAPTER) -> list[nn.Dropout]:
    """The adapter's dropout modules, one a layer; none where its probability is 0."""
    modules = [layer.lora_dropout[adapter] for layer in adapted_layers(model, adapter).values()]
    return [module for module in modules if isinstance(module, nn.Dropout)]
