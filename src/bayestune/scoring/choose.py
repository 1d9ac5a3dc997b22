"""The scorer that fits a task and a model."""

from typing import Any, get_args

from torch import nn
from transformers import PreTrainedTokenizerBase

from bayestune.adapters import is_classifier
from bayestune.data import Scoring, Task
from bayestune.errors import Refusal
from bayestune.scoring.head import HeadScorer
from bayestune.scoring.letter import LetterScorer
from bayestune.scoring.scorer import Scorer
from bayestune.scoring.text import Layout, TextScorer, can_pack
from bayestune.scoring.tokens import ANY_ROW, prompt_text


def make_scorer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    scoring: Scoring = "letter",
    max_length: int = 300,
    layout: Layout | None = None,
) -> Scorer:
    """Makes the scorer of a task for a model and its tokenizer.

    Args:
        model: the base model, before LoRA.
        tokenizer: its tokenizer.
        task: the questions.
        scoring: "letter" or "text" for a language model, "head" for one with a classification head.
        max_length: tokens of a row.
        layout: of text scoring; None packs where the model can.

    Raises:
        Refusal: if `scoring` is unknown or does not fit, or a letter is not one token.
    """
    if scoring not in get_args(Scoring):
        raise Refusal(f"unknown scoring: got {scoring!r}, expected one of {get_args(Scoring)}")
    if is_classifier(model) != (scoring == "head"):
        raise Refusal(
            f"scoring {scoring!r} does not fit a {type(model).__name__}: expected 'head' for a "
            "model with a classification head and 'letter' or 'text' for a language model"
        )
    if task.prompt.chat:
        prompt_text(tokenizer, task.prompt, ANY_ROW, scoring)  # a template that is not there
    if scoring == "head":
        return HeadScorer(tokenizer, task, max_length)
    if scoring == "letter":
        return LetterScorer(tokenizer, task, max_length)
    config: Any = model.config
    layout = layout or ("packed" if can_pack(model) else "expanded")
    bool_mask = config.get_text_config()._attn_implementation == "sdpa"
    return TextScorer(tokenizer, task, max_length, layout, bool_mask)
