"""Ready scorers for batches of your own: a head's logits, and tokens after a row's end."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SemanticSegmenterOutput

from bayestune.adapters import base_of, group_rows
from bayestune.errors import Refusal

_LABELS = ("label", "labels", "label_ids")
_OF_DECODERS = ("decoder_input_ids", "decoder_inputs_embeds")


@dataclass(frozen=True)
class HeadLogits:
    """The logits of a model's head: (N, C) of a row, (N, T, C) of tokens, (N, H, W, C) of pixels.

    For a model with a sequence classification, regression or reward head; a token or frame
    classification head, where padding is -inf for every class; or a semantic segmentation head,
    whose own order is (N, C, H, W). Labels in the batch are ignored.

    Raises:
        Refusal: if the model's output has no logits.
    """

    minds_padding: ClassVar[bool] = True

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The head's logits."""
        group_rows(model, 1)
        inputs = _without_labels(batch)
        output: Any = model(**inputs)
        logits = _logits_of(output).float()
        if isinstance(output, SemanticSegmenterOutput):
            return logits.movedim(1, -1)
        real = _real_places(model, inputs, logits)
        return logits if real is None else logits.masked_fill(~real[..., None], -torch.inf)


def _logits_of(output: Any) -> Tensor:
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        names = list(output) if isinstance(output, Mapping) else type(output).__name__
        raise Refusal(
            f"the head gives no logits: got an output of {names}, expected one with logits; give a "
            "scorer of your own, a function of model and batch, such as "
            "lambda model, batch: model(**batch).start_logits"
        )
    return logits


def _real_places(model: nn.Module, inputs: Mapping[str, Tensor], logits: Tensor) -> Tensor | None:
    """Which tokens or frames of logits (N, T, C) are no padding, (N, T); None if all are."""
    _, mask = _read_last(inputs)
    if logits.dim() != 3 or mask is None or mask.dim() != 2:
        return None
    of_frames: Any = getattr(base_of(model), "_get_feature_vector_attention_mask", None)
    if of_frames is not None and mask.shape[1] != logits.shape[1]:
        mask = of_frames(logits.shape[1], mask)  # of samples: a frame is made of many
    return mask != 0 if mask.shape == logits.shape[:2] else None


def _read_last(inputs: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """What the logits' places are of, the ids of a decoder if there is one, and its mask."""
    for start in ("decoder_", ""):
        ids = inputs.get(f"{start}input_ids", inputs.get(f"{start}inputs_embeds"))
        if ids is not None:
            return ids, inputs.get(f"{start}attention_mask")
    return None, inputs.get("attention_mask")


@dataclass(frozen=True)
class LastToken:
    """A language model's logits (N, C) of C tokens after the last real token of each row.

    Rows may be padded on either side, as their attention mask says. Of a model with a decoder of
    its own they are the decoder's, `decoder_input_ids` and `decoder_attention_mask`.

    Args:
        tokens: ids of the answers' tokens.

    Raises:
        Refusal: if there are fewer than two; in a pass, if a batch does not say what a decoder has
            read.
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
        _refuse_without_decoders(model, inputs)
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
    ids, mask = _read_last(inputs)
    if mask is None:
        ids = inputs["input_ids"] if ids is None else ids
        return torch.full((len(ids),), ids.shape[1] - 1, device=ids.device)
    return mask.shape[1] - 1 - mask.flip(1).long().argmax(1)


def _refuse_without_decoders(model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """Refuses a batch of an encoder–decoder that says what its encoder reads alone."""
    config: Any = getattr(base_of(model), "config", None)
    given = any(inputs.get(name) is not None for name in _OF_DECODERS)
    if getattr(config, "is_encoder_decoder", False) and not given:
        raise Refusal(
            f"the last token of an encoder–decoder is its decoder's: got {sorted(inputs)}, "
            "expected decoder_input_ids; give what the decoder has read, (N, 1) of "
            "config.decoder_start_token_id for the first token"
        )


def _options_for(model: nn.Module, inputs: Mapping[str, Tensor], kept: Tensor) -> dict[str, Any]:
    """Arguments by which a model computes the logits of the `kept` positions alone, if it can.

    A row that is padded on the left counts its positions from its first real token.
    """
    accepted = inspect.signature(base_of(model).forward).parameters
    mask = inputs.get("attention_mask")
    options: dict[str, Any] = {"use_cache": False}
    read, _ = _read_last(inputs)
    at_end = read is not None and len(kept) == 1 and int(kept) == read.shape[1] - 1
    options["logits_to_keep"] = 1 if at_end else kept
    if mask is not None and "position_ids" not in inputs and not mask[:, 0].all():
        options["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)
    new = options.keys() & accepted.keys() - inputs.keys()
    return {name: value for name, value in options.items() if name in new}


def _without_labels(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name not in _LABELS}
