"""Averages the log-likelihoods that draws give to options; makes a harness's questions rows."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bayestune.data import Question
from bayestune.errors import Refusal

# What an option's log-likelihood is divided by before options are compared, by the metric's name.
READINGS: Mapping[str, Callable[[str], float]] = {
    "acc": lambda _: 1.0,
    "acc_norm": lambda option: float(len(option)),
    "acc_bytes": lambda option: float(len(option.encode())),
}


def averaged_options(drawn: Tensor, temperature: float = 1.0) -> Tensor:
    """One log-likelihood (C,) for each option, whose softmax over options is the draws' average.

    x_c = log 1/S Σ_s softmax_c(ℓ_s / T) + log 1/S Σ_s Σ_c exp ℓ_sc

    The first term orders the options and has their probabilities; the second, the same for all
    options, keeps the scale of log-likelihoods, so that dividing by an option's length still means
    what it means for one model. A single draw at T = 1 keeps its own numbers.

    Args:
        drawn: ℓ (S, C), the options' log-likelihoods under each draw, in nats.
        temperature: T.

    Example:
        >>> drawn = torch.tensor([[0.5, 0.25], [0.01, 0.03]]).double().log()
        >>> averaged_options(drawn).softmax(-1)  # the average of (2/3, 1/3) and (1/4, 3/4)
        tensor([0.4583, 0.5417], dtype=torch.float64)
    """
    drawn = drawn.double()
    if len(drawn) == 1 and temperature == 1:
        return drawn[0]
    probabilities = averaged_texts((drawn / temperature).log_softmax(-1))
    return probabilities + averaged_texts(drawn.logsumexp(-1))


def averaged_texts(drawn: Tensor) -> Tensor:
    """log 1/S Σ_s exp ℓ_s, the log-likelihoods of texts under the mixture of S draws, (…).

    Args:
        drawn: ℓ (S, …), the log-likelihoods under each draw, in nats.

    Example:
        >>> averaged_texts(torch.tensor([0.5, 0.1]).double().log()).exp()
        tensor(0.3000, dtype=torch.float64)
    """
    return drawn.logsumexp(0) - math.log(len(drawn))


@dataclass(frozen=True)
class OptionRows:
    """Questions of a task, and what the draws say of their options.

    Args:
        questions: N, with their answers.
        drawn: for each question the options' log-likelihoods (S, C), over the temperature.
        left_out: for each document that is not among them, the reason.
    """

    questions: tuple[Question, ...]
    drawn: tuple[Tensor, ...]
    left_out: tuple[str, ...] = ()

    def logits(self, reading: str) -> Tensor:
        """Class logits (S, N, C), -inf where a row has fewer options.

        Args:
            reading: which of `READINGS` the log-likelihoods are divided by.
        """
        divisor_of = READINGS[reading]
        rows = []
        for question, drawn in zip(self.questions, self.drawn, strict=True):
            divisors = torch.tensor([divisor_of(option) for option in question.options])
            rows.append((drawn / divisors).transpose(0, 1))
        padded = pad_sequence(rows, batch_first=True, padding_value=-torch.inf)  # (N, C, S)
        return padded.permute(2, 0, 1)


def option_rows(
    task: Any, samples: Iterable[Mapping[str, Any]], drawn: Mapping[int, Tensor]
) -> OptionRows:
    """The rows of a multiple-choice task of a harness, from its logged samples.

    Args:
        task: the harness's, which gives texts, options and answers of its documents.
        samples: of this task; a document may have several, one for each filter.
        drawn: log-likelihoods (S, C) of each document's options, by its number.
    """
    questions = []
    of_questions = []
    left_out = []
    for number, sample in {sample["doc_id"]: sample for sample in samples}.items():
        try:
            question = _question(task, sample)
            if len(question.options) != drawn[number].shape[1]:
                got = f"{drawn[number].shape[1]} requests for {len(question.options)} options"
                raise Refusal(f"row {number}: got {got}; expected one each")
        except Refusal as problem:
            left_out.append(str(problem))
            continue
        questions.append(question)
        of_questions.append(drawn[number])
    return OptionRows(tuple(questions), tuple(of_questions), tuple(left_out))


def _question(task: Any, sample: Mapping[str, Any]) -> Question:
    """A document as a row; its text is that of the question, without the examples before it."""
    number = sample["doc_id"]
    options = tuple(map(str, task.doc_to_choice(sample["doc"])))
    text = task.doc_to_text(sample["doc"])
    target = sample["target"]
    if getattr(task, "multiple_input", False):
        # the options are contexts, and the document's text says which of them is right
        target = text
        text = " | ".join(options)
    if not isinstance(text, str) or not text.strip():
        text = f"{number}"
    return Question(f"{number}", text, options, _answer(number, target, options))


def _answer(number: int, target: Any, options: Sequence[str]) -> int:
    """The index of the right option, which tasks give as an index, a text, or a list of one."""
    if isinstance(target, list) and len(target) == 1:
        target = target[0]
    if isinstance(target, str):
        target = options.index(target) if target in options else None
    if isinstance(target, bool) or not isinstance(target, int) or not 0 <= target < len(options):
        raise Refusal(
            f"row {number}: got the target {target!r}; expected one of its {len(options)} options"
        )
    return target
