"""A mixture of posteriors on one base model, each under its own adapter: an ensemble."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from bayestune.adapters import (
    Slots,
    active,
    are_alike,
    drawn,
    evaluating,
    exclusive,
    refuse_inside_drawn,
    unwrapped,
)
from bayestune.errors import Refusal
from bayestune.forward import Batch, ClassLogits, Draws, KeptDraws, drawn_logits, stacked
from bayestune.posteriors.fit_report import FitReport
from bayestune.posteriors.posterior import AdapterPosterior, Posterior, Saved, State


@dataclass
class Mixture(Posterior):
    """1/K Σ_k q_k: draw s is draw ⌊s/K⌋ of member s mod K, so that S draws are spread evenly.

    Where all members' draws are adapters of the same layers with the same scalings and nothing else
    was trained, all draws run in one pass: the base weights are read once. Otherwise each member
    runs under its own adapter. A mixture of one has a mean if the member has one; K members with
    atoms, the same number each, have K times as many: K points have K.

    Args:
        members: the posteriors, on the same PEFT model under different adapter names.
        report: what the fit took.

    Raises:
        Refusal: if there are no members, they share an adapter, or their models differ.
    """

    kind: ClassVar[str] = "mixture"
    members: Sequence[Posterior]
    report: FitReport = field(default_factory=FitReport, repr=False)
    _kept: KeptDraws = field(default_factory=KeptDraws, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = [member.adapter for member in self.members]
        models = {id(member.model) for member in self.members}
        if not names or len(set(names)) < len(names) or len(models) > 1:
            raise Refusal(
                "a mixture needs members on one model, each with its own adapter: got the adapters "
                f"{names} on {len(models)} models; use methods.Ensemble"
            )
        first = self.members[0]
        self.model = first.model
        self.scorer = first.scorer
        self.adapter = first.adapter  # in whose slots the draws run
        self.by_batch = any(member.by_batch for member in self.members)
        self.has_mean = len(names) == 1 and first.has_mean
        of_each = {member.atoms for member in self.members}
        fixed = of_each.pop() if len(of_each) == 1 else None  # a member's own number of draws
        self.atoms = None if fixed is None else len(names) * fixed

    def __getstate__(self) -> dict[str, Any]:
        """All but the draws kept between batches, which no copy can use."""
        return {**vars(self), "_kept": KeptDraws()}

    def on(self, scorer: ClassLogits) -> Self:
        """The same mixture with another scorer."""
        return replace(self, members=[member.on(scorer) for member in self.members])

    def passes(self, draws: int) -> int:
        """Those of all members for their parts of the draws."""
        size = len(self.members)
        total = 0
        for k, member in enumerate(self.members):
            of_member = len(range(k, draws, size))
            total += member.passes(of_member) if of_member else 0
        return max(total, 1)

    def member_of(self, index: int) -> Posterior:
        """The member that a draw comes from."""
        return self.members[index % len(self.members)]

    def draw(self, index: int, seed: int = 0) -> dict[str, Tensor]:
        """All matrices of one draw by slot name, A (r, k) and B (d, r), float32 on the CPU.

        Raises:
            Refusal: if the members' draws are not adapters.
        """
        member = self.member_of(index)
        if not isinstance(member, AdapterPosterior):
            raise Refusal(
                f"{type(member).__name__} draws are not adapters: got a mixture of them, expected "
                "members whose draws are adapters; use `logits`"
            )
        means = {name: weight.float().cpu() for name, weight in member.slots.weights().items()}
        return {**means, **member.draw(index // len(self.members), seed)}

    def logits(self, inputs: Batch, draws: Draws) -> Tensor:
        """Class logits (S, N, C), member by member where they cannot run in one pass."""
        if len(self.members) == 1:
            return self.members[0].logits(inputs, draws)
        self._refuse_mean(draws)
        with exclusive(self.model):
            return self._logits_of_several(inputs, draws)

    def _refuse_mean(self, draws: Draws) -> None:
        if draws.count == 0:
            raise Refusal(
                f"a mixture of {len(self.members)} has no mean: got draws=0, expected 1 or more"
            )

    @contextmanager
    def side_by_side(self, draws: Draws) -> Iterator[float]:
        """All members' draws in the slots of the first.

        Raises:
            Refusal: if they run member by member only.
        """
        if len(self.members) == 1:
            with self.members[0].side_by_side(draws) as temperature:
                yield temperature
            return
        self._refuse_mean(draws)
        if not self._runs_in_one_pass():
            kinds = ", ".join(sorted({type(member).__name__ for member in self.members}))
            raise Refusal(
                f"members that run one by one cannot generate together: got {kinds}, expected "
                "members whose draws are adapters of the same layers and scalings; generate with "
                "one of `members`"
            )
        model = unwrapped(self.model)
        first_alone = active(model, self.adapter, alone=True)
        with exclusive(model), first_alone, draws.precision(model), evaluating(model):
            refuse_inside_drawn(model, self.adapter)
            with drawn(self.model, stacked(self.draw, draws), self.adapter):
                yield 1.0

    def _logits_of_several(self, inputs: Batch, draws: Draws) -> Tensor:
        if self._runs_in_one_pass():
            with active(self.model, self.adapter, alone=True), draws.precision(self.model):
                return drawn_logits(self, inputs, draws, self._kept)
        self.refuse_shared_prefix(draws)
        return self._member_by_member(inputs, draws)

    def _runs_in_one_pass(self) -> bool:
        """Whether all draws are adapters that act alike in the slots of the first member."""
        if not all(isinstance(member, AdapterPosterior) for member in self.members):
            return False
        return are_alike([Slots(self.model, member.adapter) for member in self.members])

    def _member_by_member(self, inputs: Batch, draws: Draws) -> Tensor:
        size = len(self.members)
        by_member: list[Tensor] = []
        order: list[int] = []  # the draws' indices in the mixture, member by member
        for k, member in enumerate(self.members):
            indices = [index for index in draws.indices if index % size == k]
            if indices:
                of_member = replace(draws, first=indices[0] // size, count=len(indices))
                with active(self.model, member.adapter, alone=True):
                    by_member.append(member.logits(inputs, of_member))
                order += indices
        return torch.cat(by_member)[torch.tensor(order).argsort()]

    def state(self) -> State:
        """Nothing of its own: each member is an artefact."""
        return {}, {}

    @classmethod
    def restore(cls, saved: Saved) -> Self:
        """Refuses: `load_posterior` loads a mixture member by member."""
        raise NotImplementedError("a mixture is loaded member by member: use load_posterior")
