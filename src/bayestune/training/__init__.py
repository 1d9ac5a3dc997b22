"""Fits adapters with `transformers.Trainer`, through its public arguments.

`Training` says how; `fit_adapter` is the beginning and the end of every method's fit.
"""

from bayestune.training.callbacks import Interrupted, NotFiniteError, Terminated, add_to_log
from bayestune.training.checkpoints import newest_checkpoint, start_anew
from bayestune.training.meter import Meter
from bayestune.training.training import (
    Training,
    adamw,
    fit_adapter,
    start_adapter,
    train,
)

__all__ = [
    "Interrupted",
    "Meter",
    "NotFiniteError",
    "Terminated",
    "Training",
    "adamw",
    "add_to_log",
    "fit_adapter",
    "newest_checkpoint",
    "start_adapter",
    "start_anew",
    "train",
]
