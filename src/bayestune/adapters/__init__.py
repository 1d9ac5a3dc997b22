"""The seam to PEFT: finds LoRA's slots, fills them, and refuses what cannot be made stochastic.

Only this package and `posteriors.storage` import peft.
"""

from bayestune.adapters.arrivals import (
    Arrivals,
    OtherRows,
    check_arrived,
    check_mean_arrives,
    watching,
    why_silent,
)
from bayestune.adapters.drawn_linear import DrawnLinear
from bayestune.adapters.entrances import group_rows
from bayestune.adapters.gaussian_linear import GaussianLinear, Noise, bayesify
from bayestune.adapters.locks import base_of, exclusive, refuse_inside_drawn
from bayestune.adapters.lora import (
    Lora,
    active,
    attach,
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
from bayestune.adapters.wrapped import eagerly, is_compiled, plain_path, unwrapped

__all__ = [
    "ADAPTER",
    "PREFIX",
    "SIDES",
    "Arrivals",
    "DrawnLinear",
    "GaussianLinear",
    "Lora",
    "Noise",
    "OtherRows",
    "RankLinear",
    "RowGroups",
    "Slots",
    "TrainingPasses",
    "active",
    "attach",
    "base_of",
    "bayesify",
    "check_arrived",
    "check_mean_arrives",
    "detach",
    "drawn",
    "eagerly",
    "evaluating",
    "exclusive",
    "group_rows",
    "held_noise",
    "held_weights",
    "is_classifier",
    "is_compiled",
    "make_ranks_random",
    "output_head",
    "plain_path",
    "put_means",
    "refuse_inside_drawn",
    "split_name",
    "unwrapped",
    "watching",
    "why_silent",
]
