"""S draws through a model in as few passes as possible.

`Draws` says which draws; `passes` runs them, and the other modules compute once what they share.
"""

from bayestune.forward.common_prefix import without_common_prefix
from bayestune.forward.draws import (
    Batch,
    ClassLogits,
    Draws,
    main_input,
    on_device,
    repeat_rows,
    seeded,
    stacked,
)
from bayestune.forward.kept_tokens import has_own_window
from bayestune.forward.passes import KeptDraws, drawn_logits, mean_logits
from bayestune.forward.verdicts import (
    Verdicts,
    agrees,
    coincidences,
    finite_rms,
    kind_of,
    sizes_change,
    without_comparison,
)
from bayestune.forward.ways import checked

__all__ = [
    "Batch",
    "ClassLogits",
    "Draws",
    "KeptDraws",
    "Verdicts",
    "agrees",
    "checked",
    "coincidences",
    "drawn_logits",
    "finite_rms",
    "has_own_window",
    "kind_of",
    "main_input",
    "mean_logits",
    "on_device",
    "repeat_rows",
    "seeded",
    "sizes_change",
    "stacked",
    "without_common_prefix",
    "without_comparison",
]
