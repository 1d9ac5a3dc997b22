"""The seam to PEFT: finds LoRA's slots, fills them, and refuses what cannot be made stochastic.

Only this package and `posteriors.storage` import peft.
"""

from bayestune.adapters.adapter_facts import facts_of, mean_digest
from bayestune.adapters.adapter_folder import (
    CONFIG,
    DETAILS,
    FILES,
    FORMAT,
    TENSORS,
    WEIGHTS,
    add_beside,
    place_of,
    plain_state,
    write_posterior,
)
from bayestune.adapters.arrivals import (
    Arrivals,
    OtherRows,
    check_arrived,
    check_mean_arrives,
    watching,
    why_silent,
)
from bayestune.adapters.base_samples import differs, differs_frozen, frozen_samples
from bayestune.adapters.drawn_linear import DrawnLinear
from bayestune.adapters.entrances import found_passes, group_rows
from bayestune.adapters.gaussian_linear import GaussianLinear, Noise, bayesify, make_gaussian
from bayestune.adapters.locks import base_of, exclusive, refuse_inside_drawn
from bayestune.adapters.lora import (
    Lora,
    active,
    attach,
    detach,
    evaluating,
    head_parts,
    input_embedding,
    is_classifier,
    old_names_unsaid,
    output_head,
)
from bayestune.adapters.noise import held_noise, held_weights
from bayestune.adapters.own_saving import noise_of
from bayestune.adapters.precision import num_quantised, precision_of, quant_method_of
from bayestune.adapters.rank_linear import RankLinear, make_ranks_random, put_means
from bayestune.adapters.row_groups import RowGroups
from bayestune.adapters.settings import are_alike
from bayestune.adapters.slots import ADAPTER, PREFIX, SIDES, Slots, drawn, split_name
from bayestune.adapters.spread import (
    all_agree,
    is_partitioned,
    is_spread,
    no_other,
    part_here,
    shape_of,
    whole,
)
from bayestune.adapters.training_passes import TrainingPasses
from bayestune.adapters.unsavable import refuse_unless_saved_whole
from bayestune.adapters.wrapped import eagerly, is_compiled, plain_path, unwrapped

__all__ = [
    "ADAPTER",
    "CONFIG",
    "DETAILS",
    "FILES",
    "FORMAT",
    "PREFIX",
    "SIDES",
    "TENSORS",
    "WEIGHTS",
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
    "add_beside",
    "all_agree",
    "are_alike",
    "attach",
    "base_of",
    "bayesify",
    "check_arrived",
    "check_mean_arrives",
    "detach",
    "differs",
    "differs_frozen",
    "drawn",
    "eagerly",
    "evaluating",
    "exclusive",
    "facts_of",
    "found_passes",
    "frozen_samples",
    "group_rows",
    "head_parts",
    "held_noise",
    "held_weights",
    "input_embedding",
    "is_classifier",
    "is_compiled",
    "is_partitioned",
    "is_spread",
    "make_gaussian",
    "make_ranks_random",
    "mean_digest",
    "no_other",
    "noise_of",
    "num_quantised",
    "old_names_unsaid",
    "output_head",
    "part_here",
    "place_of",
    "plain_path",
    "plain_state",
    "precision_of",
    "put_means",
    "quant_method_of",
    "refuse_inside_drawn",
    "refuse_unless_saved_whole",
    "shape_of",
    "split_name",
    "unwrapped",
    "watching",
    "whole",
    "why_silent",
    "write_posterior",
]
