"""Has accelerate treat gloo processes on CPUs as GPUs, to which it keeps FSDP and DeepSpeed.

Imported by scripts under `accelerate launch`, before accelerate looks at the machine.
"""

import importlib
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType


def pretend() -> None:
    """Replaces what accelerate finds: gloo, and several devices."""
    begin: Any = PartialState.__init__

    def started(self: Any, cpu: bool = False, **options: Any) -> None:
        begin(self, cpu=False, **options)

    def found(*_: Any, **__: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU

    def set_device(self: Any) -> None:
        self.device = torch.device("cpu")

    PartialState.__init__ = started  # type: ignore[method-assign]
    PartialState._prepare_backend = found  # type: ignore[method-assign]
    PartialState.set_device = set_device  # type: ignore[method-assign]


def without_compiling() -> None:
    """Keeps DeepSpeed from building C++ for CPUs at first use: minutes, and not what is tried."""
    ops: Any = importlib.import_module("deepspeed.ops")
    ops.__compatible_ops__.clear()
