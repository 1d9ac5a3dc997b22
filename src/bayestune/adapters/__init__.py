"""The seam to PEFT: finds LoRA's slots, fills them, and refuses what cannot be made stochastic.

Only this package and `posteriors.storage` import peft.
"""

from bayestune.adapters.adapter_folder import (
    CONFIG,
    DETAILS,
    FORMAT,
    TENSORS,
    WEIGHTS,
    add_beside,
    facts_of,
    make_readable,
    mean_digest,
    place_of,
    plain_state,
    refuse_unless_saved_whole,
    write_posterior,
)
from bayestune.adapters.base_samples import differs
from bayestune.adapters.drawn_linear import DrawnLinear
from bayestune.adapters.gaussian_linear import GaussianLinear, Noise, bayesify, make_gaussian
from bayestune.adapters.lora import (
    Lora,
    active,
    attach,
    base_of,
    detach,
    evaluating,
    is_classifier,
    output_head,
)
from bayestune.adapters.noise import held_noise, held_weights
from bayestune.adapters.own_saving import noise_of
from bayestune.adapters.rank_linear import RankLinear, make_ranks_random, put_means
from bayestune.adapters.row_groups import RowGroups, group_rows
from bayestune.adapters.settings import are_alike
from bayestune.adapters.slots import ADAPTER, PREFIX, SIDES, Slots, drawn, split_name

__all__ = [
    "ADAPTER",
    "CONFIG",
    "DETAILS",
    "FORMAT",
    "PREFIX",
    "SIDES",
    "TENSORS",
    "WEIGHTS",
    "DrawnLinear",
    "GaussianLinear",
    "Lora",
    "Noise",
    "RankLinear",
    "RowGroups",
    "Slots",
    "active",
    "add_beside",
    "are_alike",
    "attach",
    "base_of",
    "bayesify",
    "detach",
    "differs",
    "drawn",
    "evaluating",
    "facts_of",
    "group_rows",
    "held_noise",
    "held_weights",
    "is_classifier",
    "make_gaussian",
    "make_ranks_random",
    "make_readable",
    "mean_digest",
    "noise_of",
    "output_head",
    "place_of",
    "plain_state",
    "put_means",
    "refuse_unless_saved_whole",
    "split_name",
    "write_posterior",
]
