"""Questions → token batches → class logits (N, C): by the answer's token, its text, or a head.

A scorer encodes rows, collates them into batches, and maps a model and a batch to class logits.
"""

from bayestune.scoring.activations import mean_pass
from bayestune.scoring.batches import batches_by_length, row_logits, shared_row_logits
from bayestune.scoring.choose import make_scorer
from bayestune.scoring.given_batches import HeadLogits, LastToken
from bayestune.scoring.head import HeadScorer, own_classes
from bayestune.scoring.lengths import check_lengths, position_limit
from bayestune.scoring.letter import LetterScorer
from bayestune.scoring.next_token import NextToken
from bayestune.scoring.scorer import Encoded, Scorer
from bayestune.scoring.text import TextScorer

__all__ = [
    "Encoded",
    "HeadLogits",
    "HeadScorer",
    "LastToken",
    "LetterScorer",
    "NextToken",
    "Scorer",
    "TextScorer",
    "batches_by_length",
    "check_lengths",
    "make_scorer",
    "mean_pass",
    "own_classes",
    "position_limit",
    "row_logits",
    "shared_row_logits",
]
