"""The methods: frozen hyper-parameters and one verb, `fit(model, scorer, training) → Posterior`.

One file a method; `METHODS` is the table of all.
"""

from bayestune.methods.blob import BBB, AuthorsBLoB, BLoB
from bayestune.methods.dalorra import DALorRA
from bayestune.methods.ensemble import Ensemble
from bayestune.methods.ivon import IVON
from bayestune.methods.laplace import Laplace
from bayestune.methods.map import MAP
from bayestune.methods.mc_dropout import MCDropout
from bayestune.methods.method import Method
from bayestune.methods.mle import MLE
from bayestune.methods.recipes import Settings, WithTraining, changed, described, make_method
from bayestune.methods.registry import METHODS
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
    "Settings",
    "Temperature",
    "WithTraining",
    "changed",
    "described",
    "make_method",
]
