"""Bayesian LoRA: fine-tune as with stock LoRA, get probabilities that can be trusted."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bayestune.adaptive import Adaptive, predict_adaptively
    from bayestune.allocator import keep_freed_memory
    from bayestune.artefact import export_draw, load_posterior, save_posterior
    from bayestune.forms import Gaussian, Mixture, Point
    from bayestune.kl import KLStep
    from bayestune.lora import Lora, bayesify, drawn
    from bayestune.methods import METHODS, MLE, BLoB, Method
    from bayestune.models import load_model
    from bayestune.posterior import Draws, Posterior, Prediction, predict
    from bayestune.questions import Question, load_rows
    from bayestune.scoring import make_scorer
    from bayestune.tasks import Task, load_task
    from bayestune.training import Training

__version__ = "0.1.0"

_HOMES = {
    "adaptive": ("Adaptive", "predict_adaptively"),
    "allocator": ("keep_freed_memory",),
    "artefact": ("export_draw", "load_posterior", "save_posterior"),
    "kl": ("KLStep",),
    "lora": ("Lora", "bayesify", "drawn"),
    "methods": ("METHODS", "MLE", "BLoB", "Method"),
    "models": ("load_model",),
    "forms": ("Gaussian", "Mixture", "Point"),
    "posterior": ("Draws", "Posterior", "Prediction", "predict"),
    "scoring": ("make_scorer",),
    "questions": ("Question", "load_rows"),
    "tasks": ("Task", "load_task"),
    "training": ("Training",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "METHODS",
    "MLE",
    "Adaptive",
    "BLoB",
    "Draws",
    "Gaussian",
    "KLStep",
    "Lora",
    "Method",
    "Mixture",
    "Point",
    "Posterior",
    "Prediction",
    "Question",
    "Task",
    "Training",
    "bayesify",
    "drawn",
    "export_draw",
    "keep_freed_memory",
    "load_model",
    "load_posterior",
    "load_rows",
    "load_task",
    "make_scorer",
    "predict",
    "predict_adaptively",
    "save_posterior",
]


def __getattr__(name: str) -> Any:
    """Imports a public name where it is first used, so that `import bayestune` costs nothing."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'bayestune' has no attribute {name!r}")
    return getattr(importlib.import_module(f"bayestune.{_HOME_OF[name]}"), name)
