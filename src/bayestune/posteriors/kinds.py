"""The families of posteriors, by the name that an artefact keeps."""

from typing import Any

from bayestune.posteriors.gaussian import Gaussian
from bayestune.posteriors.linearised import Linearised, Sampled
from bayestune.posteriors.low_rank import LowRank
from bayestune.posteriors.mixture import Mixture
from bayestune.posteriors.noisy_passes import Dropout, TokenNoise
from bayestune.posteriors.point import Point
from bayestune.posteriors.scaled import Scaled
from bayestune.posteriors.tempered import Tempered

KINDS: dict[str, type[Any]] = {
    form.kind: form
    for form in (
        Point,
        Gaussian,
        TokenNoise,
        Scaled,
        LowRank,
        Dropout,
        Linearised,
        Sampled,
        Tempered,
        Mixture,
    )
}
