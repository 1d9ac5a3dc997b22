"""A posterior whose logits are divided by a temperature."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

from torch import Tensor

from bayestune.errors import Refusal
from bayestune.forward import Batch, ClassLogits, Draws
from bayestune.posteriors.fit_report import FitReport
from bayestune.posteriors.posterior import KINDS, Posterior, Saved, State


@dataclass
class Tempered(Posterior):
    """Each draw's logits over T: p(y | x) = 1/S Σ_s softmax(f_s(x)/T).

    Args:
        base: the posterior whose logits are divided; it gives model, scorer, adapter and atoms.
        temperature: T > 0; above 1 the probabilities are less sure.
        report: what the fit took.

    Raises:
        Refusal: if T is not positive.
    """

    kind: ClassVar[str] = "tempered"
    base: Posterior
    temperature: float
    report: FitReport = field(default_factory=FitReport, repr=False)

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise Refusal(
                f"the temperature must be positive: got {self.temperature}; 1 changes nothing"
            )
        self.model = self.base.model
        self.scorer = self.base.scorer
        self.adapter = self.base.adapter
        self.has_mean = self.base.has_mean
        self.by_batch = self.base.by_batch
        self.atoms = self.base.atoms

    def on(self, scorer: ClassLogits) -> Self:
        """The same posterior with another scorer."""
        return replace(self, base=self.base.on(scorer))

    def logits(self, inputs: Batch, draws: Draws) -> Tensor:
        """The base's logits over T, (S, N, C)."""
        return self.base.logits(inputs, draws) / self.temperature

    def passes(self, draws: int) -> int:
        """The base's."""
        return self.base.passes(draws)

    @contextmanager
    def side_by_side(self, draws: Draws) -> Iterator[float]:
        """The base's context; gives the base's temperature times T."""
        with self.base.side_by_side(draws) as temperature:
            yield temperature * self.temperature

    def state(self) -> State:
        """The base's tensors, its kind and facts, and the temperature."""
        tensors, facts = self.base.state()
        base = {"kind": self.base.kind, "facts": facts}
        return tensors, {"temperature": self.temperature, "base": base}

    @classmethod
    def restore(cls, saved: Saved) -> Self:
        """The posterior of a saved `state`."""
        base = saved.facts["base"]
        posterior = KINDS[base["kind"]].restore(replace(saved, facts=base["facts"]))
        return cls(posterior, saved.facts["temperature"])
