"""The seam to PEFT: finds LoRA's slots, puts stochastic layers in them, and refuses what cannot be one.

Only this package and `posteriors.storage` import peft.
"""

from bayestune.adapters.gaussian_linear import (
    GaussianLinear,
    Noise,
    RowGroups,
    bayesify,
    gaussian_layers,
    group_rows,
)
from bayestune.adapters.lora import (
    Lora,
    active,
    attach,
    base_of,
    detach,
    evaluating,
    is_classifier,
)
from bayestune.adapters.noise import held_noise, held_weights
from bayestune.adapters.rank_linear import RankLinear, make_ranks_random, put_means
from bayestune.adapters.slots import (
    ADAPTER,
    PREFIX,
    SIDES,
    adapted_layers,
    adapter_weights,
    drawn,
    head_modules,
    put,
    replaceable_slots,
    slot_names,
    slots,
)

__all__ = [
    "ADAPTER",
    "PREFIX",
    "SIDES",
    "GaussianLinear",
    "Lora",
    "Noise",
    "RankLinear",
    "RowGroups",
    "active",
    "adapted_layers",
    "adapter_weights",
    "attach",
    "base_of",
    "bayesify",
    "detach",
    "drawn",
    "evaluating",
    "gaussian_layers",
    "group_rows",
    "head_modules",
    "held_noise",
    "held_weights",
    "is_classifier",
    "make_ranks_random",
    "put",
    "put_means",
    "replaceable_slots",
    "slot_names",
    "slots",
]
