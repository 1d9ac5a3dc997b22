"""Letter scoring: class logits are the logits of the answers' tokens at the last position."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from bayestune.adapters import group_rows
from bayestune.data import Question
from bayestune.scoring.tokens import (
    Encoded,
    Encoder,
    _with_labels,
    answer_tokens,
    last_logits,
    left_padded,
    positions,
)


@dataclass
class LetterScorer(Encoder):
    """Class logits are the logits of the answers' tokens at the last position; missing options have -inf.

    Args:
        tokenizer: the model's.
        task: gives prompts and labels.
        max_length: tokens of a prompt; a longer one loses the end of its passage.
    """

    @cached_property
    def tokens(self) -> list[int]:
        """The labels' token ids, found on a prompt of the task."""
        rows = (*self.task.train, *self.task.held_out, *self.task.evaluation)
        widest = max(rows, key=lambda row: len(row.options))
        prompt = self.task.prompt.render(widest, "letter")
        return answer_tokens(
            self.tokenizer, prompt[-40:], self.task.prompt.answers(widest, "letter")
        )

    def encode(self, rows: Sequence[Question]) -> list[Encoded]:
        """Token ids, number of options and answer of each row."""
        encoded, truncated = [], 0
        for row in rows:
            self.task.prompt.answers(row, "letter")
            ids, cut = self.prompt_ids(row, "letter")
            truncated += cut
            encoded.append(
                {"ids": ids, "options": len(row.options), "answer": row.answer, "length": len(ids)}
            )
        self.warn_of(truncated, len(rows))
        return encoded

    def collate(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """A left-padded batch."""
        counts = torch.tensor([row["options"] for row in rows])
        mask = left_padded([[1] * len(row["ids"]) for row in rows], 0)
        batch = {
            "input_ids": left_padded([row["ids"] for row in rows], self.pad),
            "attention_mask": mask,
            "position_ids": positions(mask),
            "option_mask": torch.arange(int(counts.max())) < counts[:, None],
        }
        return _with_labels(batch, rows)

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Class logits (N, C)."""
        group_rows(model, 1)
        logits, mask = last_logits(model, batch, keep=1)[:, -1], batch["option_mask"]
        tokens = torch.tensor(self.tokens[: mask.shape[1]], device=logits.device)
        return logits[:, tokens].float().masked_fill(~mask, -torch.inf)
