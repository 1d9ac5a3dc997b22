"""Ways to predict with one artefact: its mean, so many draws, narrower or wider ones, a student."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from bayestune.data import Question
from bayestune.errors import NUMBER, check_fields
from bayestune.forward import Draws
from bayestune.posteriors import Gaussian, Posterior, count_for
from bayestune.scoring import Scorer, mean_pass, row_logits


@dataclass(frozen=True)
class Way:
    """How rows are predicted.

    Args:
        draws: S; 0 for the mean.
        draw_seed: of the held draws.
        bf16: whether under bfloat16 autocast.
        factor: on every standard deviation of a Gaussian.
        student: folder of the student that predicts in the posterior's place, as seen from its own.
        student_digest: of that folder.
    """

    draws: int = 10
    draw_seed: int = 0
    bf16: bool = False
    factor: float = 1.0
    student: str | None = None
    student_digest: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, draws=NUMBER, draw_seed=NUMBER)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """The way that a calibration's settings tell."""
        names = [field.name for field in fields(cls) if field.name in settings]
        return cls(**{name: settings[name] for name in names})

    @property
    def settings(self) -> dict[str, Any]:
        """The way as a calibration keeps it."""
        return asdict(self)

    def name(self, posterior: Posterior) -> str:
        """What the table of variants calls it."""
        if self.student is not None:
            return "student"
        if posterior.atoms is not None:
            return "as it is"
        if self.draws == 0:
            return "mean"
        factor = "" if self.factor == 1 else f", Ω × {self.factor:g}"
        return f"{self.draws} draws{factor}"

    def logits(self, posterior: Posterior, scorer: Scorer, rows: Sequence[Question]) -> Tensor:
        """Logits (S, N, C) of rows, -inf where a row has fewer options."""
        count = count_for(posterior, self.draws)
        draws = Draws(count, self.draw_seed, bf16=self.bf16)
        with _widened(posterior, self.factor):
            return row_logits(posterior, scorer, scorer.encode(rows), draws)

    def watched(
        self, posterior: Posterior, scorer: Scorer, rows: Sequence[Question]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same logits, and the mean's activations A x (N, r) by slot name.

        They are of one pass if the mean is what predicts, else of one more.
        """
        own, found = mean_pass(posterior, scorer, scorer.encode(rows), bf16=self.bf16)
        if count_for(posterior, self.draws) == 0:
            return own, found
        return self.logits(posterior, scorer, rows), found


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Logits (S, n_i, C_i) of some rows each as those of all, (S, N, C)."""
    width = max(part.shape[2] for part in parts)
    return torch.cat([pad(part, (0, width - part.shape[2]), value=-torch.inf) for part in parts], 1)


@contextmanager
def _widened(posterior: Posterior, factor: float) -> Iterator[None]:
    """Every Ω = G² times a factor, for the time of the context."""
    if factor == 1 or not isinstance(posterior, Gaussian):
        yield
        return
    kept = {name: slot.root_std.detach().clone() for name, slot in posterior.layers().items()}
    try:
        posterior.scale_std(kept, factor)
        yield
    finally:
        posterior.scale_std(kept, 1)
