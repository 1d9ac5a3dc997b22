"""A posterior whose logits are divided by a temperature."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from bayestune.forward import Batch, ClassLogits, Draws
from bayestune.posteriors.posterior import Posterior, Saved, State


@dataclass
class Tempered:
    """Each draw's logits over T: p(y | x) = 1/S Σ_s softmax(f_s(x)/T).

    Args:
        base: the posterior whose logits are divided.
        temperature: T > 0; above 1 the probabilities are less sure.
        fitted: what the fit reports.

    Raises:
        ValueError: if T is not positive.
    """

    kind: ClassVar[str] = "tempered"
    base: Posterior
    temperature: float
    fitted: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"the temperature must be positive: got {self.temperature}; 1 changes nothing"
            )

    @property
    def model(self) -> nn.Module:
        """The base's PEFT model."""
        return self.base.model

    @property
    def score(self) -> ClassLogits:
        """The base's scorer."""
        return self.base.score

    @property
    def adapter(self) -> str:
        """The base's adapter."""
        return self.base.adapter

    @property
    def has_mean(self) -> bool:
        """Whether the base has a mean."""
        return self.base.has_mean

    @property
    def atoms(self) -> int | None:
        """The base's."""
        return self.base.atoms

    def logits(self, inputs: Batch, draws: Draws) -> Tensor:
        """The base's logits over T, (S, N, C)."""
        return self.base.logits(inputs, draws) / self.temperature

    def state(self) -> State:
        """The base's tensors, its kind and facts, and the temperature."""
        tensors, facts = self.base.state()
        return tensors, {
            "temperature": self.temperature,
            "base": {"kind": self.base.kind, "facts": facts},
        }

    @classmethod
    def restore(cls, saved: Saved) -> Self:
        """The posterior of `state`."""
        from bayestune.posteriors.kinds import KINDS  # the table of all forms, this one among them

        base = saved.facts["base"]
        posterior = KINDS[base["kind"]].restore(replace(saved, facts=base["facts"]))
        return cls(posterior, saved.facts["temperature"])
