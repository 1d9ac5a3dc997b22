"""Ready scorers for batches of your own: a head's logits, and tokens after a row's end."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bayestune.adapters import base_of, group_rows
from bayestune.errors import Refusal

_LABELS = ("label", "labels", "label_ids")


@dataclass(frozen=True)
class HeadLogits:
    """The logits of a model's head: (N, C) of a row, or (N, T, C) of its tokens.

    For a model with a sequence classification, regression or reward head, or a token classification
    head; of tokens, padding has -inf for every class. Labels in the batch are ignored.
    """

    minds_padding: ClassVar[bool] = True

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The head's logits."""
        group_rows(model, 1)
        inputs = _without_labels(batch)
        logits = model(**inputs).logits.float()
        mask = inputs.get("attention_mask")
        if logits.dim() == 3 and mask is not None and mask.shape == logits.shape[:2]:
            logits = logits.masked_fill(mask[..., None] == 0, -torch.inf)
        return logits


@dataclass(frozen=True)
class LastToken:
    """A language model's logits (N, C) of C tokens after the last real token of each row.

    Rows may be padded on either side, as their attention mask says.

    Args:
        tokens: ids of the answers' tokens.

    Raises:
        Refusal: if there are fewer than two.
    """

    tokens: Sequence[int]
    minds_padding: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if len(set(self.tokens)) < 2 or len(set(self.tokens)) < len(self.tokens):
            raise Refusal(
                f"a choice is between tokens: got {list(self.tokens)}, expected two ids or more, "
                "each once; give the first token of every answer"
            )

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The tokens' logits."""
        group_rows(model, 1)
        inputs = _without_labels(batch)
        ends = last_positions(inputs)
        kept = ends.unique()
        logits = model(**inputs, **_options_for(model, inputs, kept)).logits
        if logits.shape[1] == len(kept):
            ends = torch.searchsorted(kept, ends)
        rows = torch.arange(len(ends), device=logits.device)
        of_ends = logits[rows, ends.to(logits.device)]
        return of_ends[:, torch.tensor(list(self.tokens), device=logits.device)].float()


def last_positions(inputs: Mapping[str, Tensor]) -> Tensor:
    """The place of each row's last real token, (N,).

    Example:
        >>> last_positions({"attention_mask": torch.tensor([[1, 1, 0], [0, 1, 1]])}).tolist()
        [1, 2]
    """
    mask = inputs.get("attention_mask")
    if mask is None:
        ids = inputs["input_ids"]
        return torch.full((len(ids),), ids.shape[1] - 1, device=ids.device)
    return mask.shape[1] - 1 - mask.flip(1).long().argmax(1)


def _options_for(model: nn.Module, inputs: Mapping[str, Tensor], kept: Tensor) -> dict[str, Any]:
    """Arguments by which a model computes the logits of the `kept` positions alone, if it can.

    A row that is padded on the left counts its positions from its first real token.
    """
    accepted = inspect.signature(base_of(model).forward).parameters
    mask = inputs.get("attention_mask")
    options: dict[str, Any] = {"use_cache": False}
    at_end = len(kept) == 1 and int(kept) == inputs["input_ids"].shape[1] - 1
    options["logits_to_keep"] = 1 if at_end else kept
    if mask is not None and "position_ids" not in inputs and not mask[:, 0].all():
        options["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)
    new = options.keys() & accepted.keys() - inputs.keys()
    return {name: value for name, value in options.items() if name in new}


def _without_labels(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name not in _LABELS}
