"""The table of methods, by the name that commands and records use.

A new method is one file and one entry here; `bayestune.methods` exports every class of the table.
"""

from typing import Any

from bayestune.methods.blob import BBB, AuthorsBLoB, BLoB
from bayestune.methods.dalorra import DALorRA
from bayestune.methods.distilled import Distilled
from bayestune.methods.early_stopping import EarlyStopping
from bayestune.methods.ensemble import Ensemble
from bayestune.methods.ivon import IVON
from bayestune.methods.laplace import Laplace
from bayestune.methods.map import MAP
from bayestune.methods.mc_dropout import MCDropout
from bayestune.methods.mle import MLE
from bayestune.methods.scalabl import ScalaBL
from bayestune.methods.swag import SWAG
from bayestune.methods.temperature import PosteriorScale, Temperature
from bayestune.methods.tfb import TFB

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
    "early_stopping": EarlyStopping,
    "distilled": Distilled,
}

__all__ = ["METHODS", *(method.__name__ for method in METHODS.values())]  # noqa: PLE0604 # pyright: ignore[reportUnsupportedDunderAll]
