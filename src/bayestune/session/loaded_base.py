"""Stands for a method whose posterior is in a folder already, as the base of another method."""

from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from bayestune.methods import Method
from bayestune.posteriors import Posterior, artefact_folder, posterior_digest
from bayestune.scoring import Scorer
from bayestune.session.session import Session
from bayestune.training import Training


@dataclass(frozen=True)
class LoadedBase:
    """Stands for a method: its `fit` loads the posterior in a folder instead of fitting.

    Args:
        session: with the model and the task of the fit.
        folder: of the posterior.
        method: the one that was fitted; it is fitted again for another training than `training`.
        training: of the fit; None to load the posterior whatever training is asked for.
    """

    session: Session
    folder: Path
    method: Method | None = None
    training: Training | None = None

    def fit(self, model: nn.Module, scorer: Scorer, training: Training) -> Posterior:
        """The posterior in the folder; if it had another training, a new fit of the method."""
        if self.method is not None and self.training is not None:
            # where checkpoints go and whether they are resumed makes no other training
            same_place = {"output": self.training.output, "resume": self.training.resume}
            if replace(training, **same_place) != self.training:
                return self.method.fit(model, scorer, training)
        posterior = self.session.load(self.folder).posterior
        posterior.digest = posterior_digest(artefact_folder(self.folder))
        return posterior
