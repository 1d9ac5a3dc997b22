"""The methods: frozen hyper-parameters and one verb, `fit(model, scorer, training) → Posterior`."""

from typing import Any

from bayestune.methods.bbb import BBB
from bayestune.methods.blob import BLoB
from bayestune.methods.blob_authors import AuthorsBLoB
from bayestune.methods.dalorra import DALorRA
from bayestune.methods.ensemble import Ensemble
from bayestune.methods.ivon import IVON
from bayestune.methods.laplace import Laplace
from bayestune.methods.map import MAP
from bayestune.methods.mc_dropout import MCDropout
from bayestune.methods.mle import MLE
from bayestune.methods.protocol import Method
from bayestune.methods.scalabl import ScalaBL
from bayestune.methods.swag import SWAG
from bayestune.methods.temperature import PosteriorScale, Temperature
from bayestune.methods.tfb import TFB

__all__ = [
    "BBB",
    "IVON",
    "MAP",
    "METHODS",
    "MLE",
    "SWAG",
    "TFB",
    "AuthorsBLoB",
    "BLoB",
    "DALorRA",
    "Ensemble",
    "Laplace",
    "MCDropout",
    "Method",
    "PosteriorScale",
    "ScalaBL",
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
    "blob_authors": AuthorsBLoB,
    "tfb": TFB,
    "temperature": Temperature,
    "posterior_scale": PosteriorScale,
    "ivon": IVON,
    "swag": SWAG,
    "scalabl": ScalaBL,
    "dalorra": DALorRA,
}
