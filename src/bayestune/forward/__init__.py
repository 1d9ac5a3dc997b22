"""S draws through a model in as few passes as possible.

`Draws` says which draws; `passes` runs them, and the other modules compute once what they share.
"""

from bayestune.forward.common_prefix import without_common_prefix
from bayestune.forward.draws import Batch, ClassLogits, Draws, on_device, repeat_rows, seeded
from bayestune.forward.passes import Plan, drawn_logits, mean_logits

__all__ = [
    "Batch",
    "ClassLogits",
    "Draws",
    "Plan",
    "drawn_logits",
    "mean_logits",
    "on_device",
    "repeat_rows",
    "seeded",
    "without_common_prefix",
]
