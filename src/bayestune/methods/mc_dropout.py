"""MC dropout: LoRA's dropout kept on when drawing."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from bayestune.errors import NUMERIC, Refusal, check_fields
from bayestune.methods.held_out import check_point
from bayestune.methods.method import Method
from bayestune.methods.mle import MLE
from bayestune.posteriors import Dropout, Point, Scaled
from bayestune.scoring import Scorer
from bayestune.training import Training


@dataclass(frozen=True)
class MCDropout:
    """Trains the base with dropout on the adapter's input, and draws by dropping again.

    Args:
        base: what trains the adapter; it must return a point.
        dropout: the probability to drop, in (0, 1).
        masks: "token", PEFT's as in the paper, new for every token: a draw is not a function;
            "held", one mask on A's columns for each draw and layer: a draw is an adapter.

    Raises:
        Refusal: if the probability is out of range.

    Reference:
        Gal, Ghahramani: Dropout as a Bayesian approximation, ICML 2016,
        https://arxiv.org/abs/1506.02142.
    """

    base: Method = field(default_factory=MLE)
    dropout: float = 0.1
    masks: Literal["token", "held"] = "token"

    def __post_init__(self) -> None:
        check_fields(self, dropout=NUMERIC)
        if not 0 < self.dropout < 1:
            raise Refusal(f"dropout must lie in (0, 1): got {self.dropout}; the paper uses 0.1")

    def fit(self, model: nn.Module, scorer: Scorer, training: Training) -> Dropout | Scaled:
        """Fits the base with dropout."""
        training = replace(training, lora=replace(training.lora, dropout=self.dropout))
        point = check_point(self.base.fit(model, scorer, training), "MCDropout")
        self._check_trained_with(point)
        if self.masks == "token":
            return Dropout(point.model, scorer, adapter=point.adapter, report=point.report)
        shapes = point.slots.shapes()
        names = point.slots.names()
        kept = {name: torch.full((1, shapes[name][1]), 1 - self.dropout) for name in names}
        return Scaled(point.model, scorer, kept, adapter=point.adapter, report=point.report)

    def _check_trained_with(self, point: Point) -> None:
        """Refuses a base that was trained under another dropout than the draws would have."""
        config: Any = point.model.peft_config  # type: ignore[union-attr]
        trained_with = config[point.adapter].lora_dropout
        if trained_with != self.dropout:
            raise Refusal(
                f"MCDropout drops as its base was trained: got a base trained with a dropout of "
                f"{trained_with}, expected {self.dropout}; leave lora.dropout out of the base's "
                "training, and take another base than Distilled, whose student has no dropout"
            )
