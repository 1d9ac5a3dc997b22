"""Deep ensembles: independent fits of any method, averaged."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import nn

from bayestune.adapters import detach
from bayestune.errors import COUNT, Refusal, check_fields
from bayestune.methods.method import Method
from bayestune.methods.mle import MLE
from bayestune.methods.started import check_started, facts_of
from bayestune.methods.unlabelled import inner_methods
from bayestune.methods.workplace import refuse_parts_of, workplace
from bayestune.posteriors import (
    DETAILS,
    FitReport,
    Mixture,
    load_members,
    read_details,
    save_posterior,
)
from bayestune.runtime import in_first_process
from bayestune.scoring import Scorer
from bayestune.training import Training


@dataclass(frozen=True)
class Ensemble:
    """K fits of the base from different seeds: initial adapters, noise and order of rows differ.

    The base model is in memory once; probabilities are averaged, not logits.

    Args:
        base: the method of each member.
        size: K, 1 or more.
        seed_step: member k is fitted with the run's seed + k·seed_step.

    Reference:
        Lakshminarayanan, Pritzel, Blundell: Deep ensembles, NeurIPS 2017,
        https://arxiv.org/abs/1612.01474.
    """

    base: Method = field(default_factory=MLE)
    size: int = 3
    seed_step: int = 1000

    def __post_init__(self) -> None:
        check_fields(self, seed_step=COUNT)
        if self.size < 1:
            raise Refusal(
                f"an ensemble needs members: got size={self.size}, expected 1 or more; 3 is usual"
            )
        if self.size > 1 and _sets_seed(self.base):
            raise Refusal(
                "an ensemble's members differ by their seeds: got a base whose training sets "
                "`seed`, which makes them all alike, expected none; set the ensemble's own seed"
            )

    def fit(self, model: nn.Module, scorer: Scorer, training: Training) -> Mixture:
        """Fits the members one by one; with `training.resume` those that are finished are kept."""
        refuse_parts_of("Ensemble")
        with workplace(training) as place:
            folders = [place / f"member-{k}" for k in range(self.size)]
            any_size = replace(self, size=1)  # a resumed fit may have more members than before
            facts = facts_of(any_size, model, scorer, training)
            for folder in () if training.resume else folders:
                in_first_process(partial((folder / DETAILS).unlink, missing_ok=True))
            check_started(place, facts, folders, resume=training.resume)
            for k, folder in enumerate(folders):
                if training.resume and (folder / DETAILS).is_file():
                    continue
                seed = training.seed + k * self.seed_step
                of_member = replace(training, seed=seed, output=folder / "checkpoints")
                posterior = self.base.fit(model, scorer, of_member)
                fitted = {"fitted": posterior.report.as_dict()}
                in_first_process(partial(save_posterior, posterior, folder, fitted))
                detach(posterior.model)
            reports = [FitReport.of_dict(read_details(folder)["fitted"]) for folder in folders]
            return Mixture(load_members(model, folders, scorer), _summed(reports))


def _sets_seed(method: Any) -> bool:
    """Whether a method, or what it builds on, is trained from a seed of its own."""
    return "seed" in getattr(method, "changes", ()) or any(map(_sets_seed, inner_methods(method)))


def _summed(reports: Sequence[FitReport]) -> FitReport:
    """Seconds, steps and log lines of all members, and the largest memory of one."""
    return FitReport(
        seconds=sum(report.seconds for report in reports),
        steps=sum(report.steps for report in reports),
        history=[line for report in reports for line in report.history],
        peak_memory_mb=max(report.peak_memory_mb for report in reports),
    )
