"""Distributions over adapters, one file a family, and what they predict.

Every family gives its draws' logits (S, N, C); those whose draws are adapters can export them.
"""

from bayestune.adapters import DETAILS
from bayestune.posteriors.export import export_draw
from bayestune.posteriors.fit_report import FitReport
from bayestune.posteriors.folder_of import PosteriorError, is_hub_id, read_details
from bayestune.posteriors.gaussian import Gaussian
from bayestune.posteriors.likelihoods import (
    LabelPrediction,
    Likelihood,
    Regression,
    RegressionPrediction,
    Reward,
    RewardPrediction,
    Sigmoid,
    Softmax,
)
from bayestune.posteriors.linearised import Linearised, Sampled, gaussian_logits
from bayestune.posteriors.low_rank import LowRank
from bayestune.posteriors.mixture import Mixture
from bayestune.posteriors.noisy_passes import Dropout, TokenNoise
from bayestune.posteriors.point import Point, Teacher
from bayestune.posteriors.posterior import KINDS, AdapterPosterior, Posterior, Saved
from bayestune.posteriors.predicting import count_for, predict
from bayestune.posteriors.prediction import Prediction, refuse_one_class
from bayestune.posteriors.saving import save_adapter, save_posterior
from bayestune.posteriors.scaled import Scaled
from bayestune.posteriors.signature import artefact_folder, posterior_digest
from bayestune.posteriors.storage import (
    base_name,
    load_adapter,
    load_members,
    load_posterior,
)
from bayestune.posteriors.tempered import Tempered

__all__ = [
    "DETAILS",
    "KINDS",
    "AdapterPosterior",
    "Dropout",
    "FitReport",
    "Gaussian",
    "LabelPrediction",
    "Likelihood",
    "Linearised",
    "LowRank",
    "Mixture",
    "Point",
    "Posterior",
    "PosteriorError",
    "Prediction",
    "Regression",
    "RegressionPrediction",
    "Reward",
    "RewardPrediction",
    "Sampled",
    "Saved",
    "Scaled",
    "Sigmoid",
    "Softmax",
    "Teacher",
    "Tempered",
    "TokenNoise",
    "artefact_folder",
    "base_name",
    "count_for",
    "export_draw",
    "gaussian_logits",
    "is_hub_id",
    "load_adapter",
    "load_members",
    "load_posterior",
    "posterior_digest",
    "predict",
    "read_details",
    "refuse_one_class",
    "save_adapter",
    "save_posterior",
]
