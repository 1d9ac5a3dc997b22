"""The methods: frozen hyper-parameters and one verb, `fit(model, scorer, training) → Posterior`.

One file a method; `METHODS` is the table of all.
"""

from bayestune.methods import registry as _registry
from bayestune.methods.distilled import distil
from bayestune.methods.method import Method
from bayestune.methods.preconditions import check_launch, check_method
from bayestune.methods.recipes import Settings, WithTraining, changed, described, make_method
from bayestune.methods.registry import *  # noqa: F403
from bayestune.methods.started import STARTED, other_settings
from bayestune.methods.unlabelled import inner_methods, learns_unlabelled

__all__ = [  # noqa: PLE0604 # pyright: ignore[reportUnsupportedDunderAll]
    *_registry.__all__,
    "STARTED",
    "Method",
    "Settings",
    "WithTraining",
    "changed",
    "check_launch",
    "check_method",
    "described",
    "distil",
    "inner_methods",
    "learns_unlabelled",
    "make_method",
    "other_settings",
]
