"""Makes batches of what users give `predict`: a batch, a DataLoader or a Dataset."""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from bayestune.adapters import base_of
from bayestune.errors import Refusal
from bayestune.forward import Batch
from bayestune.posteriors.posterior import Posterior

GivenRows = DataLoader[Any] | Dataset[Any] | Sequence[Mapping[str, Any]] | Iterable[Batch]
ROWS = 8  # of a Dataset in one batch
_LABELS = ("label", "labels", "label_ids")


def batches_of(inputs: Any, posterior: Posterior) -> Iterator[Batch]:
    """The batches to predict.

    Args:
        inputs: a batch, which is given back as it is; a loader of batches; or a Dataset of
            tokenised rows, which are stacked.
        posterior: whose model and scorer will read the batches.

    Raises:
        Refusal: if rows or batches are not mappings, or rows of different lengths would have to be
            padded for a scorer that might read the padding.
    """
    if isinstance(inputs, Mapping):
        yield inputs
    elif not (hasattr(inputs, "__iter__") or hasattr(inputs, "__getitem__")):
        raise Refusal(
            f"nothing to predict: got {inputs!r}, expected a batch such as {{'input_ids': …}}, a "
            "DataLoader or a Dataset; give one"
        )
    elif isinstance(inputs, DataLoader) or not hasattr(inputs, "__getitem__"):
        for batch in inputs:
            _check_mapping(batch, "batch of the loader")
            yield batch
    else:
        for start in range(0, len(inputs), ROWS):
            stop = min(start + ROWS, len(inputs))
            yield _collated([inputs[index] for index in range(start, stop)], posterior)


def _check_mapping(value: Any, what: str) -> None:
    if not isinstance(value, Mapping):
        raise Refusal(
            f"a {what} names its tensors: got a {type(value).__name__}, expected a mapping such as "
            "{'input_ids': …}; use a collate_fn that returns one"
        )


def _collated(rows: Sequence[Any], posterior: Posterior) -> dict[str, Tensor]:
    """The fields that the model takes, stacked; tokens padded on the right.

    Raises:
        Refusal: if the model takes none, or they cannot be stacked.
    """
    for row in rows:
        _check_mapping(row, "row of the dataset")
    parameters = inspect.signature(base_of(posterior.model).forward).parameters
    batch: dict[str, list[Tensor]] = {}
    for name in rows[0]:
        if name in parameters and name not in _LABELS:
            batch[name] = [torch.as_tensor(row[name]) for row in rows]
    if not batch:
        raise Refusal(
            f"the rows have nothing that the model takes: got {sorted(rows[0])}, expected such as "
            "input_ids; tokenise the dataset first"
        )
    _mask_padding(batch, posterior.scorer)
    pad = getattr(base_of(posterior.model).config, "pad_token_id", None) or 0
    pads: dict[str, int] = {"input_ids": pad, "decoder_input_ids": pad}
    return {name: _stacked(values, pads.get(name, 0)) for name, values in batch.items()}


def _mask_padding(batch: dict[str, list[Tensor]], scorer: Any) -> None:
    """Adds an attention mask of ones to rows of different lengths, so that padding is masked.

    Raises:
        Refusal: if a field whose size differs from row to row does not have one entry per token,
            such as sounds, or the scorer might read the padding.
    """
    token_counts: set[tuple[int, ...]] = set()  # of all rows, in the encoder and in the decoder
    for start in ("", "decoder_"):
        lengths = tuple(len(tokens) for tokens in _tokens(batch, start))
        if len(set(lengths)) < 2:
            continue
        token_counts.add(lengths)
        _refuse_reading_padding(scorer, set(lengths))
        masks = [torch.ones(length, dtype=torch.long) for length in lengths]
        batch.setdefault(f"{start}attention_mask", masks)
    for name, values in batch.items():
        shapes = {tuple(value.shape) for value in values}
        differ_in_length = len({shape[1:] for shape in shapes}) == 1
        per_token = differ_in_length and tuple(map(len, values)) in token_counts
        if len(shapes) > 1 and not per_token:
            raise Refusal(
                f"rows that cannot be stacked: got {name} of the shapes {sorted(shapes)[:3]}, "
                "expected one shape, for what would be put at their ends the model would read as "
                "theirs; give a DataLoader whose collate_fn pads them and says so, such as "
                "DataCollatorWithPadding(feature_extractor)"
            )


def _tokens(batch: Mapping[str, list[Tensor]], start: str) -> list[Tensor]:
    """The rows' ids (T,) or embeddings (T, width); none where they have another form."""
    for name, axes in ((f"{start}input_ids", 1), (f"{start}inputs_embeds", 2)):
        values = batch.get(name, [])
        if values and all(value.dim() == axes for value in values):
            return values
    return []


def _stacked(values: list[Tensor], pad: int) -> Tensor:
    if len({value.shape for value in values}) == 1:
        return torch.stack(values)
    return pad_sequence(values, batch_first=True, padding_value=pad)


def _refuse_reading_padding(scorer: Any, lengths: set[int]) -> None:
    if not getattr(scorer, "minds_padding", False):
        raise Refusal(
            f"rows of {min(lengths)} to {max(lengths)} tokens would be padded, and it is not known "
            "where the scorer reads: got a scorer of your own, expected HeadLogits() or "
            "LastToken(…), which find a row's end; or give a DataLoader with "
            "collate_fn=DataCollatorWithPadding(tokenizer)"
        )
