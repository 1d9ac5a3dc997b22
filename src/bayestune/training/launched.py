"""What accelerate's launcher may do with a training, checked before its first step."""

import os
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from bayestune.errors import Refusal
from bayestune.kl import KLStep
from bayestune.runtime import sharding


def check_launched(callbacks: Sequence[TrainerCallback], optimizer: Any, *, bf16: bool) -> None:
    """Refuses a training that would be another one under its launcher.

    FSDP and DeepSpeed step on parts of parameters, in copies of their own. A KL step reaches these;
    a method's other callbacks and optimisers would change tensors that nothing reads.

    Args:
        callbacks: of the method.
        optimizer: makes the method's own optimiser; None for AdamW.
        bf16: whether the training computes in bfloat16.

    Raises:
        Refusal: in these cases, under FSDP 1, and if the launcher's precision is another one.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16") or (precision == "bf16" and not bf16):
        raise Refusal(
            f"the launcher's precision is not the training's: got --mixed_precision {precision} "
            f"and bf16={bf16}, expected bf16 for both, or no; give --bf16, or --mixed_precision no"
        )
    mode = sharding()
    if mode is None:
        return
    if mode.name == "FSDP 1":
        raise Refusal(
            "FSDP 1 cuts parameters into flat pieces: got --fsdp_version 1, expected FSDP 2; give "
            "--fsdp_version 2"
        )
    names = [type(each).__name__ for each in callbacks if not isinstance(each, KLStep)]
    if names or optimizer is not None:
        got = " and ".join(names) or "an optimiser of the method's own"
        raise Refusal(
            f"{mode.name} keeps what is trained in parts: got {got}, which would miss them, "
            "expected AdamW with a KL step at most (MLE, MAP, MCDropout, BLoB, BBB); start it "
            "with DDP (--multi_gpu) or in one process"
        )
