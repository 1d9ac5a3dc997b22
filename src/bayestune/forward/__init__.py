"""S draws through a model in as few passes as possible.

`Draws` says which draws; the other modules compute once what the draws share, exactly or, asked for, approximately.
"""

from bayestune.forward.draws import Batch, ClassLogits, Draws, on_device, seeded
from bayestune.forward.passes import DrawCache, drawn_logits, mean_logits, repeat_rows

__all__ = [
    "Batch",
    "ClassLogits",
    "DrawCache",
    "Draws",
    "drawn_logits",
    "mean_logits",
    "on_device",
    "repeat_rows",
    "seeded",
]
