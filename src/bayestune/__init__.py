"""Bayesian LoRA: fine-tune as with stock LoRA, get probabilities that can be trusted."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bayestune.adapters import Lora as Lora
    from bayestune.adapters import bayesify as bayesify
    from bayestune.adapters import drawn as drawn
    from bayestune.adapters import group_rows as group_rows
    from bayestune.data import Question as Question
    from bayestune.data import Task as Task
    from bayestune.data import load_rows as load_rows
    from bayestune.data import load_task as load_task
    from bayestune.decisions import Calibration as Calibration
    from bayestune.decisions import CalibrationOptions as CalibrationOptions
    from bayestune.decisions import Promise as Promise
    from bayestune.errors import Refusal as Refusal
    from bayestune.evaluation import Adaptive as Adaptive
    from bayestune.evaluation import predict_adaptively as predict_adaptively
    from bayestune.forward import Draws as Draws
    from bayestune.generation import generate as generate
    from bayestune.kl import KLStep as KLStep
    from bayestune.methods import METHODS as METHODS
    from bayestune.methods import MLE as MLE
    from bayestune.methods import BLoB as BLoB
    from bayestune.methods import Method as Method
    from bayestune.methods import distil as distil
    from bayestune.models import load_model as load_model
    from bayestune.posteriors import Gaussian as Gaussian
    from bayestune.posteriors import Mixture as Mixture
    from bayestune.posteriors import Point as Point
    from bayestune.posteriors import Posterior as Posterior
    from bayestune.posteriors import Prediction as Prediction
    from bayestune.posteriors import Regression as Regression
    from bayestune.posteriors import export_draw as export_draw
    from bayestune.posteriors import load_posterior as load_posterior
    from bayestune.posteriors import predict as predict
    from bayestune.posteriors import save_posterior as save_posterior
    from bayestune.runtime import keep_freed_memory as keep_freed_memory
    from bayestune.scoring import HeadLogits as HeadLogits
    from bayestune.scoring import LastToken as LastToken
    from bayestune.scoring import make_scorer as make_scorer
    from bayestune.session import calibrate as calibrate
    from bayestune.session import decide as decide
    from bayestune.sharing import export as export
    from bayestune.sharing import push_to_hub as push_to_hub
    from bayestune.sharing import write_card as write_card
    from bayestune.training import Training as Training

__version__ = "0.2.0"

_ROOMS = {
    "adapters": "Lora bayesify drawn group_rows",
    "data": "Question Task load_rows load_task",
    "decisions": "Calibration CalibrationOptions Promise",
    "errors": "Refusal",
    "evaluation": "Adaptive predict_adaptively",
    "forward": "Draws",
    "generation": "generate",
    "kl": "KLStep",
    "methods": "BLoB METHODS MLE Method distil",
    "models": "load_model",
    "posteriors": "Gaussian Mixture Point Posterior Prediction Regression "
    "export_draw load_posterior predict save_posterior",
    "runtime": "keep_freed_memory",
    "scoring": "HeadLogits LastToken make_scorer",
    "session": "calibrate decide",
    "sharing": "export push_to_hub write_card",
    "training": "Training",
}
_HOMES = {name: room for room, names in _ROOMS.items() for name in names.split()}

__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Imports a public name where it is first used, so that `import bayestune` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'bayestune' has no attribute {name!r}")
    return getattr(importlib.import_module(f"bayestune.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """The public names, for completion."""
    return [*__all__, "__version__"]
