"""Fits adapters with `transformers.Trainer`.

`Training` says how; methods add their callbacks and optimisers.
"""

from bayestune.training.callbacks import Interrupted
from bayestune.training.training import Training, adamw, start_adapter, train

__all__ = ["Interrupted", "Training", "adamw", "start_adapter", "train"]
