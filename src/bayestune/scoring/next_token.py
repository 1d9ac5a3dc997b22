"""The next token as a class: the whole vocabulary's logits at the end of each sequence."""

from collections.abc import Mapping

from torch import Tensor, nn

from bayestune.adapters import group_rows
from bayestune.scoring.last_logits import last_logits


class NextToken:
    """Maps a language model and a batch of sequences to logits of what follows each."""

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits (N, V), of left-padded sequences with their position ids."""
        group_rows(model, 1)
        return last_logits(model, batch, keep=1)[:, -1].float()
