"""Head scoring: class logits are those of a model's classification head."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bayestune.adapters import group_rows
from bayestune.data import Question, Task
from bayestune.errors import Refusal
from bayestune.scoring.scorer import Encoded, Scorer
from bayestune.scoring.tokens import token_ids

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass
class HeadScorer(Scorer):
    """Class logits are those of a model's classification head.

    All rows have the same options, the head's classes. The text is the question, or the pair
    (context, question) where there is a context.
    """

    when_shortened: ClassVar[str] = (
        "the end of their passage, or of a question without one, was cut"
    )

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The head's classes in order: the options of the task's rows."""
        return self.task.class_names

    def encode(self, rows: Sequence[Question]) -> list[Encoded]:
        """Token ids of each row.

        Raises:
            Refusal: if the rows do not all have the options of the task's rows.
        """
        first = next(chain(self.task.train, self.task.evaluation, rows), None)
        options = first.options if first else ()
        for row in rows:
            if row.options != options:
                raise Refusal(
                    f"row {row.id}: got the options {list(row.options)}, expected {list(options)} "
                    'in every row under scoring="head"; use scoring="letter" or "text"'
                )
        return super().encode(rows)

    def encode_row(self, row: Question) -> Encoded:
        """The tokenizer's outputs, of at most `max_length` tokens."""
        first, second = (row.context, row.question) if row.context else (row.question, None)
        inputs = dict(self.tokenizer(first, second, verbose=False))
        excess = len(inputs["input_ids"]) - self.max_length
        if excess > 0:
            if row.context and excess >= len(token_ids(self.tokenizer, row.context)):
                raise Refusal(
                    f"row {row.id}: the question takes more than max_length={self.max_length} "
                    "tokens; raise max_length"
                )
            limit = {"truncation": "only_first", "max_length": self.max_length}
            inputs = dict(self.tokenizer(first, second, **limit))
        return {"inputs": inputs, "length": len(inputs["input_ids"]), "shortened": excess > 0}

    def pad_rows(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """A batch padded as the tokenizer does."""
        return dict(self.tokenizer.pad([row["inputs"] for row in rows], return_tensors="pt"))

    def answer_places(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The tokenizer's first class token where it puts one, else the last token of the text."""
        tokens = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(tokens))
        place = torch.arange(tokens.shape[1])
        tokenizer: Any = self.tokenizer
        class_token = -1 if tokenizer.cls_token_id is None else tokenizer.cls_token_id
        is_class_token = (tokens == class_token) & (mask == 1)
        last = torch.where(mask == 1, place, 0).amax(1)
        first = torch.where(is_class_token, place, tokens.shape[1]).amin(1)
        return torch.arange(len(tokens)), torch.where(is_class_token.any(1), first, last)

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Class logits (N, C)."""
        group_rows(model, 1)
        inputs = {name: value for name, value in batch.items() if name in _INPUTS}
        return model(**inputs).logits.float()


def own_classes(model: nn.Module, task: Task) -> tuple[str, ...] | None:
    """A model's own names of its head's classes, if they are the task's options; else None.

    Args:
        model: with a classification head.
        task: whose rows all have the same options.
    """
    config: Any = model.config
    names = tuple(str(name) for _, name in sorted((config.id2label or {}).items()))
    options = set(task.class_names or ())
    return names if options and options == set(names) and len(names) == len(options) else None
