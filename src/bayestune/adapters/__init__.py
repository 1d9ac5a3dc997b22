"""The seam to PEFT: finds LoRA's slots, fills them, and refuses what cannot be made stochastic.

Only this package and `posteriors.storage` import peft.
"""

from bayestune.adapters.drawn_linear import DrawnLinear
from bayestune.adapters.entrances import group_rows
from bayestune.adapters.gaussian_linear import GaussianLinear, Noise, bayesify
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
from bayestune.adapters.rank_linear import RankLinear, make_ranks_random, put_means
from bayestune.adapters.row_groups import RowGroups
from bayestune.adapters.slots import ADAPTER, PREFIX, SIDES, Slots, drawn, split_name
from bayestune.adapters.training_passes import TrainingPasses

__all__ = [
    "ADAPTER",
    "PREFIX",
    "SIDES",
    "DrawnLinear",
    "GaussianLinear",
    "Lora",
    "Noise",
    "RankLinear",
    "RowGroups",
    "Slots",
    "TrainingPasses",
    "active",
    "attach",
    "base_of",
    "bayesify",
    "detach",
    "drawn",
    "evaluating",
    "group_rows",
    "held_noise",
    "held_weights",
    "is_classifier",
    "make_ranks_random",
    "output_head",
    "put_means",
    "split_name",
]
