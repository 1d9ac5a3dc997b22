"""How an artefact predicts: by its mean, by draws, by narrower or wider ones, by a student."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from bayestune.errors import NUMBER, check_fields
from bayestune.forward import Draws
from bayestune.posteriors import Gaussian, Posterior, count_for
from bayestune.scoring import Encoded, Scorer, mean_pass, row_logits
from bayestune.session.fit import Fit

BATCH = 8  # rows of a pass


@dataclass(frozen=True)
class PredictionOptions:
    """How rows are predicted.

    Args:
        draws: S; 0 for the mean.
        draw_seed: of the held draws.
        bf16: whether under bfloat16 autocast.
        factor: on every standard deviation of a Gaussian.
        student: folder of the student that predicts in the posterior's place, relative to its own.
        student_digest: of that folder.
        band: of a cascade. The student, or without one the mean, is asked first; rows whose
            1 − confidence then lies between these two are asked anew, under the draws.
    """

    draws: int = 10
    draw_seed: int = 0
    bf16: bool = False
    factor: float = 1.0
    student: str | None = None
    student_digest: str | None = None
    band: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_fields(self, draws=NUMBER, draw_seed=NUMBER)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """The way of predicting that a calibration's settings hold."""
        names = [field.name for field in fields(cls) if field.name in settings]
        given = {name: settings[name] for name in names}
        if given.get("band"):
            given["band"] = tuple(given["band"])  # JSON has lists
        return cls(**given)

    @property
    def settings(self) -> dict[str, Any]:
        """The way as a calibration keeps it."""
        return asdict(self)

    def name(self, posterior: Posterior) -> str:
        """What the table of variants calls it."""
        if self.band is not None:
            return "cascade"
        if self.student is not None:
            return "student"
        if posterior.atoms is not None:
            return "as it is"
        if self.draws == 0:
            return "mean"
        factor = "" if self.factor == 1 else f", Ω × {self.factor:g}"
        return f"{self.draws} draws{factor}"

    def passed(
        self, fit: Fit, scorer: Scorer, encoded: Sequence[Encoded], batch_size: int = BATCH
    ) -> Tensor:
        """Logits (S, N, C) of encoded rows, -inf where a row has fewer options.

        Args:
            fit: what predicts, and in a cascade perhaps the student that is asked first.
            scorer: of the rows.
            encoded: N rows.
            batch_size: rows of a pass.
        """
        if self.band is None:
            return self._drawn(fit.posterior, scorer, encoded, batch_size)
        first = replace(self, draws=0)._drawn(_asked_first(fit), scorer, encoded, batch_size)
        return self._cascaded(first, fit, scorer, encoded, batch_size)

    def watched(
        self, fit: Fit, scorer: Scorer, encoded: Sequence[Encoded], batch_size: int = BATCH
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same logits, and the mean's activations A x (N, r) by slot name.

        They are of one pass if the mean is what predicts, else of one more. A cascade's are those
        of its first pass, the student's or the mean's.
        """
        first, activations = mean_pass(
            _asked_first(fit), scorer, encoded, bf16=self.bf16, batch_size=batch_size
        )
        if self.band is not None:
            return self._cascaded(first, fit, scorer, encoded, batch_size), activations
        if count_for(fit.posterior, self.draws) == 0:
            return first, activations
        return self._drawn(fit.posterior, scorer, encoded, batch_size), activations

    def _cascaded(
        self, first: Tensor, fit: Fit, scorer: Scorer, encoded: Sequence[Encoded], batch_size: int
    ) -> Tensor:
        """A cascade's logits (S, N, C), given those of its first pass, (1, N, C)."""
        assert self.band is not None
        doubtful = in_band(first, self.band).nonzero()[:, 0].tolist()
        if not doubtful:
            return first.expand(count_for(fit.posterior, self.draws), -1, -1)
        chosen = [encoded[row] for row in doubtful]
        return staged(first, self._drawn(fit.posterior, scorer, chosen, batch_size), doubtful)

    def _drawn(
        self, posterior: Posterior, scorer: Scorer, encoded: Sequence[Encoded], batch_size: int
    ) -> Tensor:
        count = count_for(posterior, self.draws)
        draws = Draws(count, self.draw_seed, bf16=self.bf16)
        with widened(posterior, self.factor):
            return row_logits(posterior, scorer, encoded, draws, batch_size=batch_size)


def _asked_first(fit: Fit) -> Posterior:
    """What a cascade asks first: the student if there is one, else the posterior's mean."""
    return fit.first or fit.posterior


def in_band(first: Tensor, band: tuple[float, float]) -> Tensor:
    """Which rows (N,) are asked anew, by the first logits (1, N, C)."""
    doubt = 1 - first[0].double().softmax(-1).amax(-1)
    return (doubt >= band[0]) & (doubt <= band[1])


def staged(first: Tensor, drawn: Tensor, rows: Sequence[int]) -> Tensor:
    """A cascade's logits (S, N, C): the draws' for some rows, for the others S times the first.

    Args:
        first: logits of the first pass, (1, N, C).
        drawn: the draws' logits of n rows, (S, n, c), c ≤ C.
        rows: indices of these n rows among the N.
    """
    logits = first.expand(len(drawn), -1, -1).clone()
    missing = logits.shape[2] - drawn.shape[2]
    logits[:, list(rows)] = pad(drawn, (0, missing), value=-torch.inf)
    return logits


def joined_logits(parts: Sequence[Tensor]) -> Tensor:
    """Logits (S, N, C) of all rows, from those of lots of rows, (S, n_i, C_i); -inf fills up to C.

    Args:
        parts: one or more; N = Σ n_i, C = max C_i.
    """
    width = max(part.shape[2] for part in parts)
    return torch.cat([pad(part, (0, width - part.shape[2]), value=-torch.inf) for part in parts], 1)


@contextmanager
def widened(posterior: Posterior, factor: float) -> Iterator[None]:
    """Multiplies every Ω = G² of a Gaussian by a factor while the context lasts."""
    if factor == 1 or not isinstance(posterior, Gaussian):
        yield
        return
    kept = {name: slot.root_std.detach().clone() for name, slot in posterior.layers().items()}
    try:
        posterior.scale_std(kept, factor)
        yield
    finally:
        posterior.scale_std(kept, 1)
