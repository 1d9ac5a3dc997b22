"""The predictive: probabilities averaged over draws, and the uncertainty of each row."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from bayestune.decisions import mutual_information
from bayestune.errors import Refusal

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Prediction:
    """Averaged probabilities and the uncertainty of each row; entropies in nats.

    Args:
        probabilities: mean over draws of softmax(logits), (N, C).
        total_entropy: entropy of the averaged probabilities, (N,).
        expected_entropy: mean entropy of the draws' probabilities (aleatoric), (N,).
        mutual_information: their difference (epistemic) times S/(S − 1), (N,); 0 for one draw. The
            factor corrects the difference of a sample of S draws, which is too small by (S − 1)/S,
            so that five draws compare with ten. There is none where the draws are all there is
            (`atoms`).
        log_probabilities: logarithms of `probabilities`, (N, C), also where those are rounded to 0;
            None if they are not known.
        drawn: the probabilities of each draw, (S, N, C); None if they are not kept.
    """

    probabilities: Tensor
    total_entropy: Tensor
    expected_entropy: Tensor
    mutual_information: Tensor
    log_probabilities: Tensor | None = field(default=None, kw_only=True)
    drawn: Tensor | None = field(default=None, kw_only=True)

    @property
    def confidence(self) -> Tensor:
        """The largest probability of each row, (N,)."""
        return self.probabilities.amax(-1)

    @property
    def choice(self) -> Tensor:
        """The index of the largest probability of each row, (N,)."""
        return self.probabilities.argmax(-1)

    @classmethod
    def of(cls, logits: Tensor, *, exact: bool = False) -> Self:
        """The predictive of logits (S, N, C), in float64; -inf marks options a row does not have.

        There may be axes between N and C, such as tokens. Where every class has -inf is padding,
        whose probabilities and entropies are 0.

        Args:
            logits: of S draws.
            exact: whether the draws are all there is, such as the members of an ensemble, and not a
                sample.

        Raises:
            Refusal: if there is a single class, whose probability would be 1 whatever its logit is.

        Example:
            >>> two_sure_draws_that_disagree = torch.tensor([[[30.0, 0.0]], [[0.0, 30.0]]])
            >>> prediction = Prediction.of(two_sure_draws_that_disagree, exact=True)
            >>> prediction.probabilities.tolist(), round(prediction.mutual_information.item(), 4)
            ([[0.5, 0.5]], 0.6931)
        """
        refuse_one_class(logits)
        log_p = logits.double().log_softmax(-1)
        is_padding = logits.isneginf().all(-1, keepdim=True)
        log_p = log_p.masked_fill(is_padding, -math.inf)
        draws = log_p.exp()
        probabilities = draws.mean(0)
        total = torch.special.entr(probabilities).sum(-1)
        expected = torch.special.entr(draws).sum(-1).mean(0)
        information = mutual_information(total, expected, 1 if exact else len(logits))
        log_mean = log_p.logsumexp(0) - math.log(len(logits))
        return cls(
            probabilities,
            total,
            expected,
            information,
            log_probabilities=log_mean,
            drawn=draws,
        )

    def with_draws(self, most: int) -> Self:
        """The same, but `drawn` a copy of the first `most` draws, so that the others are freed."""
        return replace(self, drawn=None if self.drawn is None else self.drawn[:most].clone())

    @classmethod
    def in_parts(
        cls,
        logits: Tensor,
        *,
        exact: bool = False,
        temperature: float = 1.0,
        draws_kept: int | None = None,
    ) -> Self:
        """`of` logits (S, N, C), made some rows at a time.

        For a thousand draws, as of Laplace, `of` takes many times the logits' memory.

        Args:
            logits: of S draws.
            exact: as in `of`.
            temperature: which divides the logits.
            draws_kept: how many draws the prediction keeps at most; None for all.
        """
        parts = []
        for rows in logits.split(_ROWS_AT_ONCE, dim=1):
            part = cls.of(rows.double() / temperature, exact=exact)
            parts.append(part if draws_kept is None else part.with_draws(draws_kept))
        return cls.joined(parts)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """One prediction of the rows of several, which must agree in the numbers C and S."""

        def joined_field(name: str, axis: int = 0) -> Any:
            values = [getattr(part, name) for part in parts]
            return None if values[0] is None else torch.cat(values, axis)

        names = [field.name for field in fields(cls) if field.name != "drawn"]
        return cls(**{name: joined_field(name) for name in names}, drawn=joined_field("drawn", 1))


def refuse_one_class(logits: Tensor) -> None:
    """Refuses logits of a single class.

    Args:
        logits: (…, C).

    Raises:
        Refusal: if C is 1.
    """
    if logits.shape[-1] == 1:
        raise Refusal(
            "one logit has no probabilities of classes: got logits of shape "
            f"{tuple(logits.shape)}, expected two classes or more; use num_labels=2 for a yes or "
            'no, or say what the logit is: predict(…, likelihood="sigmoid"), "regression" or '
            '"reward"'
        )
