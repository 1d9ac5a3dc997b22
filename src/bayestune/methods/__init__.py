"""The methods: frozen hyper-parameters and one verb, `fit(model, scorer, training) → Posterior`."""

from typing import Any

from bayestune.methods.bbb import BBB
from bayestune.methods.blob import BLoB
from bayestune.methods.ensemble import Ensemble
from bayestune.methods.ivon import IVON
from bayestune.methods.laplace import Laplace
from bayestune.methods.map import MAP
from bayestune.methods.mc_dropout import MCDropout
from bayestune.methods.mle import MLE
from bayestune.methods.protocol import Method
from bayestune.methods.temperature import PosteriorScale, Temperature
from bayestune.methods.tfb import TFB

__all__ = [
    "BBB",
    "IVON",
    "MAP",
    "METHODS",
    "MLE",
    "TFB",
    "BLoB",
    "Ensemble",
    "Laplace",
    "MCDropout",
    "Method",
    "PosteriorScale",
    "Temperature",
]

METHODS: dict[str, type[Any]] = {
    "mle": MLE,
    "map": MAP,
    "mc_dropout": MCDropout,
    "ensemble": Ensemble,
    "bbb": BBB,
    "laplace": Laplace,
    "blob": BLoB,
    "tfb": TFB,
    "temperature": Temperature,
    "posterior_scale": PosteriorScale,
    "ivon": IVON,
}
