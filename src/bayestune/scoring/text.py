"""Text scoring: class logits are the mean log-likelihoods of the options' tokens after the question."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from bayestune.adapters import group_rows
from bayestune.data import Question
from bayestune.scoring.tokens import (
    Encoded,
    Encoder,
    _with_labels,
    last_logits,
    left_padded,
    positions,
    right_padded,
    token_ids,
)

Layout = Literal["packed", "expanded"]


@dataclass
class TextScorer(Encoder):
    """Class logits are the mean log-likelihoods of the options' tokens after the question; -inf where none.

    All options of a question see the same draw. "packed" puts question and options in one sequence, where an option
    sees the question and itself only: the question is read once. "expanded" has a sequence for each option and works
    with any model; both give the same logits.

    Args:
        tokenizer: the model's.
        task: gives prompts and options.
        max_length: tokens of the question and one option.
        layout: "packed" needs full attention that takes a mask (sdpa or eager).
        bool_mask: whether the packed mask is of type bool (sdpa) or additive (eager).
    """

    layout: Layout = "packed"
    bool_mask: bool = True
    _warned: bool = field(default=False, init=False, repr=False)

    def encode(self, rows: Sequence[Question]) -> list[Encoded]:
        """Token ids of the question and of each option, and the answer."""
        encoded, truncated = [], 0
        for row in rows:
            texts = self.task.prompt.answers(row, "text")
            room = max(len(token_ids(self.tokenizer, " " + text)) for text in texts)
            ids, cut = self.prompt_ids(row, "text", room)
            options = [self._option_ids(ids, text) for text in texts]
            truncated += cut
            length = len(ids) + (sum if self.layout == "packed" else max)(map(len, options))
            encoded.append({"ids": ids, "options": options, "answer": row.answer, "length": length})
        self.warn_of(truncated, len(rows))
        return encoded

    def _option_ids(self, prompt: list[int], text: str) -> list[int]:
        """Tokens by which the option continues the prompt; on its own where the tokenizer would merge the two."""
        tail = prompt[-8:]
        end = str(self.tokenizer.decode(tail))
        start, whole = token_ids(self.tokenizer, end), token_ids(self.tokenizer, f"{end} {text}")
        if whole[: len(start)] == start and len(whole) > len(start):
            return whole[len(start) :]
        return token_ids(self.tokenizer, " " + text)

    def collate(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """A batch in the scorer's layout."""
        batch = self._packed(rows) if self.layout == "packed" else self._expanded(rows)
        counts = torch.tensor([len(row["options"]) for row in rows])
        batch["option_mask"] = torch.arange(int(counts.max())) < counts[:, None]
        return _with_labels(batch, rows)

    def _packed(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        question = left_padded([[1] * len(row["ids"]) for row in rows], 0).bool()
        option = right_padded(
            [[c for c, ids in enumerate(r["options"]) for _ in ids] for r in rows], -1
        )
        place = right_padded(
            [[i for ids in r["options"] for i in range(len(ids))] for r in rows], 0
        )
        targets = right_padded(
            [[token for ids in r["options"] for token in ids] for r in rows], self.pad
        )
        ids = torch.cat([left_padded([row["ids"] for row in rows], self.pad), targets], 1)
        position_ids = torch.cat(
            [positions(question.long()), question.sum(1, keepdim=True) + place], 1
        )
        block = torch.cat(
            [torch.where(question, -2, -1), option], 1
        )  # -2 question, -1 padding, else the option
        sees = (block[:, :, None] == block[:, None, :]) | (block[:, None, :] == -2)
        allowed = sees & torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        mask = (
            allowed if self.bool_mask else torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
        )
        source = torch.where(
            place == 0, 0, torch.arange(option.shape[1])
        )  # the kept position that predicts a token
        return {
            "input_ids": ids,
            "attention_mask": mask[:, None],
            "position_ids": position_ids,
            "targets": targets,
            "source": source,
            "option": option,
        }

    def _expanded(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        width = max(len(row["options"]) for row in rows)
        options = [(row["options"] + [row["options"][0]] * width)[:width] for row in rows]
        sequences = [
            row["ids"] + ids for row, group in zip(rows, options, strict=True) for ids in group
        ]
        targets = left_padded([ids for group in options for ids in group], -1)
        mask = left_padded([[1] * len(ids) for ids in sequences], 0)
        return {
            "input_ids": left_padded(sequences, self.pad),
            "attention_mask": mask,
            "position_ids": positions(mask),
            "targets": targets,
        }

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Class logits (N, C)."""
        mask, targets = batch["option_mask"], batch["targets"]
        width = mask.shape[1]
        group_rows(model, 1 if self.layout == "packed" else width)
        logits = last_logits(model, batch, keep=targets.shape[1] + 1).float()
        if self.layout == "packed":
            source, option = batch["source"], batch["option"]
        else:
            source = torch.arange(targets.shape[1], device=targets.device).expand_as(targets)
            option = torch.where(targets < 0, -1, 0)
        row = torch.arange(targets.shape[0], device=targets.device)[:, None]
        likelihood = logits[row, source, targets.clamp_min(0)] - logits.logsumexp(-1).gather(
            1, source
        )
        member = option[..., None] == torch.arange(
            width if self.layout == "packed" else 1, device=option.device
        )
        means = (likelihood[..., None] * member).sum(1) / member.sum(1).clamp_min(1)
        return means.reshape(mask.shape).masked_fill(~mask, -torch.inf)
