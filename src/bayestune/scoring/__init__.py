"""Questions → token batches → class logits (N, C): by the answer's token, by its text, or by a model's head.

A scorer encodes rows, collates them into batches, and maps a model and a batch to class logits.
"""

from bayestune.scoring.batches import row_logits
from bayestune.scoring.choose import Scorer, make_scorer
from bayestune.scoring.head import HeadScorer
from bayestune.scoring.letter import LetterScorer
from bayestune.scoring.text import TextScorer

__all__ = ["HeadScorer", "LetterScorer", "Scorer", "TextScorer", "make_scorer", "row_logits"]
