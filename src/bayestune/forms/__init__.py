"""The forms a posterior can take, by the name that an artefact keeps."""

from typing import Any

from bayestune.forms.dropout import Dropout
from bayestune.forms.gaussian import Gaussian
from bayestune.forms.linearised import Linearised, Sampled
from bayestune.forms.low_rank import LowRank
from bayestune.forms.mixture import Mixture
from bayestune.forms.point import Point
from bayestune.forms.scaled import Scaled
from bayestune.forms.tempered import Tempered
from bayestune.forms.token_noise import TokenNoise

__all__ = [
    "KINDS",
    "Dropout",
    "Gaussian",
    "Linearised",
    "LowRank",
    "Mixture",
    "Point",
    "Sampled",
    "Scaled",
    "Tempered",
    "TokenNoise",
]

KINDS: dict[str, type[Any]] = {
    form.kind: form
    for form in (Point, Gaussian, TokenNoise, Scaled, LowRank, Dropout, Linearised, Sampled, Tempered, Mixture)
}
