"""Letter scoring: a language model's logits of the options' labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from bayestune.adapters import group_rows
from bayestune.data import Question
from bayestune.errors import Refusal
from bayestune.scoring.last_logits import last_logits
from bayestune.scoring.scorer import Encoded, Scorer, option_mask
from bayestune.scoring.tokens import (
    ANY_ROW,
    answer_tokens,
    before_answer,
    left_padded_inputs,
    prompt_ids,
    prompt_text,
    token_ids,
    written_before_answer,
)


@dataclass
class LetterScorer(Scorer):
    """Class logits are the logits of the labels' tokens at the last position.

    Raises:
        Refusal: if a label that a training or held-out row needs is not a token of its own; for
            other rows, when they are encoded.
    """

    def __post_init__(self) -> None:
        rows = (*self.task.train, *self.task.held_out)
        if rows:
            self._refuse_without_token(max(rows, key=lambda row: len(row.options)))

    @cached_property
    def tokens(self) -> list[int]:
        """The token of each label, up to the first label that is not a token of its own."""
        prompt = self.task.prompt
        text = prompt_text(self.tokenizer, prompt, ANY_ROW, "letter")
        return answer_tokens(self.tokenizer, text, prompt.labels, self._spaces(text))

    def _spaces(self, text: str) -> tuple[str, str]:
        written = written_before_answer(self.tokenizer, self.task.prompt, "letter")
        return before_answer(text, written)

    def _refuse_without_token(self, row: Question) -> None:
        labels = self.task.prompt.answers(row, "letter")
        if len(labels) <= len(self.tokens):
            return
        label = labels[len(self.tokens)]
        prompt = prompt_text(self.tokenizer, self.task.prompt, ANY_ROW, "letter")
        text = f"{prompt}{self._spaces(prompt)[0]}{label}"
        last = self.tokenizer.convert_ids_to_tokens(token_ids(self.tokenizer, text)[-3:])
        raise Refusal(
            f"label {label!r} is not a token of its own after the prompt: got {last} as the last "
            "tokens, expected one that is known and no other label's; use one-token labels or "
            'scoring="text"'
        )

    def encode_row(self, row: Question) -> Encoded:
        """Token ids of the prompt, and the number of options."""
        self._refuse_without_token(row)
        ids, cut = prompt_ids(self, row, "letter")
        return {"ids": ids, "options": len(row.options), "length": len(ids), "shortened": cut}

    def pad_rows(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """Prompts padded on the left (N, T), and which options the rows have (N, C)."""
        batch = left_padded_inputs([row["ids"] for row in rows], self.pad)
        batch["option_mask"] = option_mask([row["options"] for row in rows])
        return batch

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Class logits (N, C), -inf for options that a row does not have."""
        group_rows(model, 1)
        logits = last_logits(model, batch, keep=1)[:, -1]
        mask = batch["option_mask"]
        tokens = torch.tensor(self.tokens[: mask.shape[1]], device=logits.device)
        return logits[:, tokens].float().masked_fill(~mask, -torch.inf)
