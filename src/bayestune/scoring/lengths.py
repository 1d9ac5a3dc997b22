"""Whether rows fit into a model's table of positions."""

from collections.abc import Sequence

from torch import nn

from bayestune.adapters import base_of
from bayestune.data import Question
from bayestune.errors import Refusal
from bayestune.scoring.scorer import Encoded


def check_lengths(model: nn.Module, rows: Sequence[Question], encoded: Sequence[Encoded]) -> None:
    """Refuses rows with more tokens than the model's table of positions has places.

    Args:
        model: with or without such a table.
        rows: N questions.
        encoded: the same rows, encoded.
    """
    limit = position_limit(model)
    if limit is None:
        return
    for row, tokens in zip(rows, encoded, strict=True):
        if (length := _positions_used(tokens)) > limit:
            raise Refusal(
                f"row {row.id} has {length} tokens, expected at most {limit}, the places that "
                f"{type(base_of(model)).__name__} has; set max_length={limit} or shorten the row"
            )


def _positions_used(tokens: Encoded) -> int:
    """Positions that a row takes; under text scoring all its options begin at the same one."""
    options = tokens.get("options")
    if isinstance(options, list):
        return len(tokens["ids"]) + max(map(len, options))
    return tokens["length"]


def position_limit(model: nn.Module) -> int | None:
    """How many places a learned table of positions has; None for a model without such a table."""
    config = base_of(model).config.get_text_config()
    most = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if most is None:
        return None
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and ("position" in last or last == "wpe"):
            # RoBERTa's kind begins to count behind the padding token
            padding = -1 if module.padding_idx is None else module.padding_idx
            return min(most, module.num_embeddings - padding - 1)
    return None
