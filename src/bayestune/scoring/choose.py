"""The scorer that fits a task and a model."""

import inspect
from typing import Any, get_args

from torch import nn
from transformers import PreTrainedTokenizerBase

from bayestune.adapters import is_classifier
from bayestune.data import Scoring, Task
from bayestune.scoring.head import HeadScorer
from bayestune.scoring.letter import LetterScorer
from bayestune.scoring.text import Layout, TextScorer


def can_pack(model: nn.Module) -> bool:
    """Whether a model takes the packed layout: sdpa or eager attention over the full sequence in every layer."""
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    full = all(
        kind == "full_attention"
        for kind in getattr(config, "layer_types", None) or ["full_attention"]
    )
    sliding = getattr(config, "sliding_window", None) is not None and getattr(
        config, "use_sliding_window", True
    )
    positions = "position_ids" in inspect.signature(model.forward).parameters
    # a recurrent layer and ALiBi go by a token's place in the sequence, whatever mask and positions say
    by_place = getattr(model, "_is_stateful", False) or getattr(config, "alibi", False)
    return (
        config._attn_implementation in ("sdpa", "eager")
        and full
        and not sliding
        and positions
        and not by_place
    )


Scorer = LetterScorer | TextScorer | HeadScorer


def make_scorer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    scoring: Scoring = "letter",
    max_length: int = 300,
    layout: Layout | None = None,
) -> Scorer:
    """The scorer of a task for a model and its tokenizer.

    Args:
        model: the base model, before LoRA.
        tokenizer: its tokenizer.
        task: the questions.
        scoring: "letter" or "text" for a language model, "head" for one with a classification head.
        max_length: tokens of a prompt.
        layout: of text scoring; None packs where the model can.

    Raises:
        ValueError: if `scoring` is unknown or not the model's, or an answer is not one token under "letter".
    """
    if scoring not in get_args(Scoring):
        raise ValueError(f"unknown scoring: got {scoring!r}, expected one of {get_args(Scoring)}")
    if is_classifier(model) != (scoring == "head"):
        raise ValueError(
            f"scoring {scoring!r} does not fit a {type(model).__name__}: expected 'head' for a model with a "
            "classification head and 'letter' or 'text' for a language model"
        )
    if scoring == "head":
        return HeadScorer(tokenizer, task, max_length)
    if scoring == "letter":
        scorer = LetterScorer(tokenizer, task, max_length)
        _ = (
            scorer.tokens
        )  # an answer that is not one token is refused now, not in the middle of a fit
        return scorer
    sdpa = model.config.get_text_config()._attn_implementation == "sdpa"  # type: ignore[union-attr, operator]
    return TextScorer(
        tokenizer, task, max_length, layout or ("packed" if can_pack(model) else "expanded"), sdpa
    )
