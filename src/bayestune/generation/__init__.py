"""Text under held draws: each token from the average over draws, with its uncertainty.

`generate` runs transformers' own loop over S·N rows, draw by draw. `Generation` is what it returns.
"""

from bayestune.generation.continuing import DrawsAs, generate
from bayestune.generation.generated import Generation, SequenceUncertainty

__all__ = ["DrawsAs", "Generation", "SequenceUncertainty", "generate"]
