"""A method whose posterior is in a folder already, in the place of a method that builds on it."""

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
    """A base that is loaded instead of fitted.

    Args:
        session: with the model and the task of the fit.
        folder: of the posterior.
        method: that was fitted, for another training than the one it had.
        training: of the fit; None where the posterior stands for any.
    """

    session: Session
    folder: Path
    method: Method | None = None
    training: Training | None = None

    def fit(self, model: nn.Module, scorer: Scorer, training: Training) -> Posterior:
        """The posterior in the folder; where it had another training, a fit of the method."""
        if self.method is not None and self.training is not None:
            where = {"output": self.training.output, "resume": self.training.resume}
            if replace(training, **where) != self.training:
                return self.method.fit(model, scorer, training)
        posterior = self.session.load(self.folder).posterior
        posterior.digest = posterior_digest(artefact_folder(self.folder))
        return posterior
