"""A mixture of posteriors on one base model, each under an adapter of its own: what an ensemble returns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from bayestune.adapters import active, adapter_weights, head_modules
from bayestune.forward import Batch, ClassLogits, DrawCache, Draws, drawn_logits
from bayestune.posteriors.posterior import Posterior, Saved, State


@dataclass
class Mixture:
    """1/K Σ_k q_k: draw s is member s mod K's draw ⌊s/K⌋, so that S draws are spread evenly over the members.

    Where all members' draws are adapters of the same layers and nothing else was trained, all draws run in one pass:
    the base weights are read once. Otherwise each member runs under its own adapter.

    Args:
        members: the posteriors, on the same PEFT model under different adapter names.
        fitted: what the fit reports.

    Raises:
        ValueError: if there are no members, they share an adapter, or their models differ.
    """

    kind: ClassVar[str] = "mixture"
    members: Sequence[Posterior]
    fitted: Mapping[str, Any] = field(default_factory=dict, repr=False)
    has_mean: bool = field(default=False, init=False)
    _held: DrawCache = field(default_factory=DrawCache, init=False, repr=False)

    def __post_init__(self) -> None:
        names = [member.adapter for member in self.members]
        if (
            not names
            or len(set(names)) < len(names)
            or any(m.model is not self.model for m in self.members)
        ):
            raise ValueError(
                f"a mixture needs members on one model, each with its own adapter: got the adapters {names} on "
                f"{len({id(member.model) for member in self.members})} models; use methods.Ensemble"
            )
        self.has_mean = len(names) == 1 and self.members[0].has_mean

    @property
    def model(self) -> nn.Module:
        """The PEFT model of all members."""
        return self.members[0].model

    @property
    def score(self) -> ClassLogits:
        """The members' scorer."""
        return self.members[0].score

    @property
    def adapter(self) -> str:
        """The first member's adapter, in whose slots the draws run."""
        return self.members[0].adapter

    @property
    def atoms(self) -> int | None:
        """K for a mixture of points, else None."""
        return len(self.members) if all(member.atoms == 1 for member in self.members) else None

    def draw(self, index: int, seed: int = 0) -> dict[str, Tensor]:
        """All matrices of one draw by slot name, A (r, k) and B (d, r).

        Raises:
            ValueError: if the members' draws are no adapters.
        """
        member: Any = self.members[index % len(self.members)]
        if not hasattr(member, "draw"):
            raise ValueError(
                f"draws of {type(member).__name__} are no adapters: got no `draw`; use `logits`"
            )
        own = {
            name: weight.float().cpu()
            for name, weight in adapter_weights(self.model, member.adapter).items()
        }
        return {**own, **member.draw(index // len(self.members), seed)}

    def _one_pass(self) -> bool:
        first = [(n, w.shape) for n, w in adapter_weights(self.model, self.adapter).items()]
        return all(
            hasattr(member, "draw")
            and not head_modules(self.model, member.adapter)
            and [(n, w.shape) for n, w in adapter_weights(self.model, member.adapter).items()]
            == first
            for member in self.members
        )

    def logits(self, inputs: Batch, draws: Draws) -> Tensor:
        """The draws' logits (S, N, C), member by member where they cannot run in one pass."""
        size = len(self.members)
        if size == 1:
            return self.members[0].logits(inputs, draws)
        if self._one_pass():
            return drawn_logits(self, inputs, draws, self._held)
        draws.refuse_prefix(self)
        parts: dict[int, Tensor] = {}
        for k, member in enumerate(self.members):
            own = [index for index in draws.indices if index % size == k]
            if own:
                which = replace(draws, first=own[0] // size, count=len(own))
                with active(self.model, member.adapter):
                    parts.update(zip(own, member.logits(inputs, which), strict=True))
        return torch.stack([parts[index] for index in draws.indices])

    def state(self) -> State:
        """Nothing of its own: an artefact keeps each member as an artefact."""
        return {}, {}

    @classmethod
    def restore(cls, saved: Saved) -> Self:
        """A mixture has no state of its own.

        Raises:
            NotImplementedError: always; `artefact.load_posterior` loads the members.
        """
        raise NotImplementedError(
            "a mixture is loaded member by member: use artefact.load_posterior"
        )
