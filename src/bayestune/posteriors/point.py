"""A point: all the mass on one adapter."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import KW_ONLY, asdict, dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from bayestune.forward import Batch, Draws, mean_logits
from bayestune.posteriors.posterior import AdapterPosterior, Saved, State


@dataclass(frozen=True)
class Teacher:
    """What a student was distilled from.

    Args:
        digest: of the posterior that taught it, as `posterior_digest` returns it.
        draws: S of the average that it learnt, or "fresh" if each batch had a draw of its own.
        rows: how many rows it learnt on.
        rows_digest: a hash of the rows' questions and options.
    """

    digest: str
    draws: int | str
    rows: int
    rows_digest: str

    def __str__(self) -> str:
        kind = "fresh draws" if self.draws == "fresh" else f"an average of {self.draws}"
        return f"{kind} of the posterior {self.digest[:12]} on {self.rows} rows"


@dataclass
class Point(AdapterPosterior):
    """A posterior with all its mass on one adapter: what maximum likelihood and MAP return.

    Args:
        model: the PEFT model.
        scorer: maps (model, batch) to class logits (N, C).
        adapter: the adapter's name; None for the active one.
        report: what the fit took.
        teacher: what it was distilled from, if it is a student.
    """

    kind: ClassVar[str] = "point"
    atoms = 1
    _: KW_ONLY
    teacher: Teacher | None = None

    def draw(self, index: int, seed: int = 0) -> dict[str, Tensor]:
        """Nothing: no draw differs from the mean."""
        return {}

    def _drawn(self, inputs: Batch, draws: Draws) -> Tensor:
        logits = mean_logits(self.model, self.scorer, inputs)
        return logits.expand(draws.count, *logits.shape[1:])

    def _beside(self, draws: Draws) -> AbstractContextManager[Any]:
        return nullcontext()

    def state(self) -> State:
        """No tensors; a student's teacher."""
        return {}, {} if self.teacher is None else {"teacher": asdict(self.teacher)}

    @classmethod
    def restore(cls, saved: Saved) -> Self:
        """The posterior of a saved `state`."""
        facts: Mapping[str, Any] | None = saved.facts.get("teacher")
        teacher = None if facts is None else Teacher(**facts)
        return cls(saved.model, saved.scorer, adapter=saved.adapter, teacher=teacher)
