"""Texts → token ids: a prompt within the length limit, the tokens of the answers, padding."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bayestune.data import Prompt, Question, Scoring
from bayestune.errors import Refusal
from bayestune.scoring.scorer import Scorer

# Stands for any row where the result is the same for all, as the tokens of the labels are.
ANY_ROW = Question("any", "?", ("yes", "no"), answer=None)


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text, without special tokens."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]


def prompt_text(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, row: Question, scoring: Scoring
) -> str:
    """All that a model reads before a row's answer: the prompt, of a chat in the model's template.

    Raises:
        Refusal: if the tokenizer has no chat template, or its template does not take the messages.
    """
    if not prompt.chat:
        return prompt.render(row, scoring)
    if not tokenizer.chat_template:
        raise Refusal(
            "got a chat for a tokenizer without a chat template; expected a model that was tuned "
            "on chats; leave out --chat, --system and messages, or choose another --model"
        )
    messages = prompt.messages(row, scoring)
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,  # the answer stands where a model that reasons would begin to
        )
    except TemplateError as error:
        roles = [message["role"] for message in messages]
        raise Refusal(
            f"row {row.id}: the model's chat template does not take messages by {roles} ({error}); "
            "expected others; leave out --system, or messages of that role"
        ) from None
    return str(text)


def before_answer(text: str, written: str | None = None) -> tuple[str, str]:
    r"""What may stand between a prompt and its answer, a space or nothing, the likelier first.

    A space is likelier, unless the prompt ends in white space or the chat template writes none.

    Args:
        text: the prompt.
        written: what the chat template writes there; None if unknown, see `written_before_answer`.

    >>> before_answer("Answer:"), before_answer("assistant\n"), before_answer("[/INST]", "")
    ((' ', ''), ('', ' '), ('', ' '))
    """
    first = ("" if text[-1:].isspace() else " ") if written is None else written
    return (first, "" if first else " ")


def written_before_answer(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, scoring: Scoring
) -> str | None:
    """What a chat template writes between its prompt and an answer, a space or nothing, if known.

    Models were tuned on what the template makes of an assistant's message. It is unknown (None) if
    the prompt is no chat, or the template does not write the answer right after its prompt.
    """
    if not prompt.chat or prompt.spaced_by_end:
        return None
    begin = prompt_text(tokenizer, prompt, ANY_ROW, scoring)
    answered = [*prompt.messages(ANY_ROW, scoring), {"role": "assistant", "content": "A"}]
    try:
        whole = str(tokenizer.apply_chat_template(answered, tokenize=False))
    except TemplateError:
        return None
    after = whole.removeprefix(begin)
    if after == whole:
        return None
    return next((space for space in ("", " ") if after.startswith(f"{space}A")), None)


def prompt_ids(
    scorer: Scorer, row: Question, scoring: Scoring, room: int = 0
) -> tuple[list[int], bool]:
    """Token ids of a prompt within the length limit, and whether its passage was shortened for it.

    Args:
        scorer: its tokenizer, prompt and `max_length`.
        row: the question.
        scoring: how the answer is scored, which the prompt depends on.
        room: tokens that are kept free for the answer.

    Raises:
        Refusal: if the prompt is too long even without its passage.
    """
    tokenizer = scorer.tokenizer
    prompt = scorer.task.prompt
    start = [] if prompt.chat else _start_ids(tokenizer)  # a chat template writes its own
    limit = scorer.max_length - room - len(start)
    context = token_ids(tokenizer, row.context)
    keep = len(context)
    shortened = row
    while True:
        ids = token_ids(tokenizer, prompt_text(tokenizer, prompt, shortened, scoring))
        excess = len(ids) - limit
        if excess <= 0:
            return start + ids, shortened is not row
        if keep == 0:
            raise Refusal(
                f"row {row.id}: the question and its options take more than "
                f"max_length={scorer.max_length} tokens; raise max_length"
            )
        keep = max(0, keep - excess)
        passage = str(tokenizer.decode(context[:keep], clean_up_tokenization_spaces=False))
        shortened = replace(row, context=passage.rstrip("\ufffd"))  # a character cut in two


def _start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that open every text in this tokenizer, such as Llama's <s>."""
    plain = token_ids(tokenizer, "a")
    whole = list(tokenizer("a")["input_ids"])  # type: ignore[arg-type]
    places = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return whole[: next(places, 0)]


def answer_tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: str, labels: Sequence[str], spaces: Sequence[str]
) -> list[int]:
    """The token with which each label continues the prompt, up to the first label without its own.

    "Answer:" + " A" is one token " A" in byte-level BPE and "▁A" in SentencePiece; other tokenizers
    want "A", and so does a chat whose prompt ends with a line break. The first two labels, which
    every row has, decide which of the `spaces` stands before a label.

    Args:
        tokenizer: the model's.
        prompt: the text before the answer.
        labels: A, B, …
        spaces: what may stand between prompt and label, the likelier first.
    """
    start = token_ids(tokenizer, prompt)
    tokens: list[int] = []
    for separator in spaces:
        tokens = []
        for label in labels:
            *before, token = token_ids(tokenizer, prompt + separator + label)
            if before != start or token in tokens or token == tokenizer.unk_token_id:
                break
            tokens.append(token)
        if len(tokens) >= 2:
            break
    return tokens


def left_padded(sequences: Sequence[Sequence[int]], value: int) -> Tensor:
    """Sequences of different lengths as one tensor, filled up on the left."""
    width = max(map(len, sequences))
    return torch.tensor([[value] * (width - len(ids)) + list(ids) for ids in sequences])


def right_padded(sequences: Sequence[Sequence[int]], value: int) -> Tensor:
    """Sequences of different lengths as one tensor, filled up on the right."""
    width = max(map(len, sequences))
    return torch.tensor([list(ids) + [value] * (width - len(ids)) for ids in sequences])


def positions(mask: Tensor) -> Tensor:
    """Position ids that count from 0 at the first token of a left-padded mask."""
    return (mask.cumsum(-1) - 1).clamp_min(0)


def left_padded_inputs(sequences: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    """Ids, mask and positions (N, T) of sequences filled up on the left."""
    ids = left_padded(sequences, pad)
    mask = left_padded([[1] * len(sequence) for sequence in sequences], 0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}
