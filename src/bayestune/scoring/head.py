"""Head scoring: class logits are those of a model's classification head."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from bayestune.adapters import group_rows
from bayestune.data import Question
from bayestune.scoring.tokens import Encoded, Encoder, _with_labels


@dataclass
class HeadScorer(Encoder):
    """Class logits are those of a model's classification head; all rows have the same options, the head's classes.

    The text is the question, or the pair (context, question) where there is a context.

    Args:
        tokenizer: the model's.
        task: gives the questions.
        max_length: tokens of a text; of a longer pair the context loses its end.
    """

    def encode(self, rows: Sequence[Question]) -> list[Encoded]:
        """Token ids and answer of each row.

        Raises:
            ValueError: if a row's options are not those of the others.
        """
        options = next(iter((*self.task.train, *self.task.evaluation, *rows))).options
        if other := next((row for row in rows if row.options != options), None):
            raise ValueError(
                f"row {other.id}: got the options {list(other.options)}, expected {list(options)} in every row under "
                'scoring="head"; use scoring="letter" or "text"'
            )
        return [self._encoded(row) for row in rows]

    def _encoded(self, row: Question) -> Encoded:
        first, second = (row.context, row.question) if row.context else (row.question, None)
        cut = "only_first" if row.context else True
        ids = dict(self.tokenizer(first, second, truncation=cut, max_length=self.max_length))
        return {"inputs": ids, "answer": row.answer, "length": len(ids["input_ids"])}

    def collate(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """A batch padded as the tokenizer does."""
        batch = dict(self.tokenizer.pad([row["inputs"] for row in rows], return_tensors="pt"))
        return _with_labels(batch, rows)

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Class logits (N, C)."""
        group_rows(model, 1)
        return model(
            **{name: value for name, value in batch.items() if name in _HEAD_INPUTS}
        ).logits.float()


_HEAD_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
