"""The authors' own code as a reference point, from a checkout that the user has: nothing of it is in this package.

Of the checkout `modelwrappers/blob.py` is imported with what it needs, and its class's own `fit` takes the steps.
"""

import importlib
import math
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from tqdm import tqdm

from subjects import MANY_STEPS, Prompts, autocast

REPOSITORY = "https://github.com/Wang-ML-Lab/bayesian-peft"
FILE, CLASS = Path("modelwrappers/blob.py"), "BLoB"
ROOMS = (
    "modelwrappers",
    "run",
    "utils",
)  # its top-level packages: too common names to leave behind
# What its imports ask for and a training step does without: a debugger, evaluation's metrics, layers over 8-bit bases.
ABSENT = {
    "ipdb": (),
    "torchmetrics": ("Accuracy", "CalibrationError"),
    "peft.tuners.lora.bnb": ("Linear8bitLt",),
}


def _stand_in(name: str) -> ModuleType | None:
    """A module of empty classes for one that is not installed."""
    try:
        importlib.import_module(name)
    except ImportError:
        module = ModuleType(name)
        for cls in ABSENT[name]:
            setattr(module, cls, type(cls, (), {}))
        return module
    return None


@contextmanager
def _importing(folder: Path) -> Iterator[None]:
    """Imports from `folder` first; its modules are forgotten afterwards, and nothing is written there."""
    stand_ins = {name: module for name in ABSENT if (module := _stand_in(name))}
    before, path, written = dict(sys.modules), list(sys.path), sys.dont_write_bytecode
    for name in [name for name in sys.modules if name.split(".")[0] in ROOMS]:
        del sys.modules[name]
    sys.modules.update(stand_ins)
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        for name in [
            name for name in sys.modules if name.split(".")[0] in ROOMS or name in stand_ins
        ]:
            del sys.modules[name]
        sys.modules.update(
            {name: module for name, module in before.items() if name not in sys.modules}
        )
        sys.path[:], sys.dont_write_bytecode = path, written


def official_class(folder: Path) -> type:
    """The class `BLoB` of a checkout.

    Args:
        folder: the checkout.

    Raises:
        ValueError: if `folder` is no checkout of the authors' repository.
        ImportError: if it needs what is not installed.
    """
    remedy = f"clone {REPOSITORY} and give its folder"
    if not (folder / FILE).is_file():
        raise ValueError(
            f"--official: got {folder}, which has no {FILE}, expected a checkout; {remedy}"
        )
    with _importing(folder):
        try:
            module = importlib.import_module(".".join(FILE.with_suffix("").parts))
        except ImportError as error:
            raise ImportError(
                f"--official: {folder / FILE} cannot be imported: got {error!r}, expected what it needs to be "
                "installed; install that"
            ) from error
    found: Any = getattr(module, CLASS, None)
    if not all(callable(getattr(found, name, None)) for name in ("fit", "forward_logits")):
        raise ValueError(
            f"--official: {folder / FILE} has no class {CLASS} that fits, expected one; {remedy}"
        )
    module.tqdm = partial(tqdm, disable=True)  # type: ignore[attr-defined]
    return found


def settings(rows: int, classes: int) -> Namespace:
    """The arguments of the authors' script for BLoB, and what one step of it needs besides."""
    return Namespace(
        dataset_type="mcdataset",
        outdim=classes,
        batch_size=rows,
        num_samples=rows * MANY_STEPS,
        n_epochs=1,
        epoch=0,
        max_train_steps=MANY_STEPS,
        eval_per_steps=math.inf,
        warmup_ratio=0.06,
        opt="adamw",
        lr=1e-4,
        adam_epsilon=1e-6,
        opt_wd=0.0,
        load_lora_path=None,
        bayes_eps=0.05,
        bayes_beta=0.2,
        bayes_gamma=8,
        bayes_kllr=0.01,
        bayes_klreweighting=True,
        bayes_datasetrescaling=True,
        bayes_train_n_samples=1,
        bayes_eval_n_samples=1,
        bayes_inference_notsample=False,
    )


def one_process(device: torch.device) -> Namespace:
    """What `fit` asks of an accelerator, for one process."""
    return Namespace(
        device=device,
        num_processes=1,
        is_local_main_process=False,
        backward=lambda loss: loss.backward(),
        gather=lambda values: values,
    )


@dataclass
class OfficialStep:
    """One step of the authors' `fit`: a loader of one batch."""

    wrapper: Any
    batches: list[tuple[dict[str, Tensor], Tensor, Tensor]]
    device: torch.device
    precision: str

    def __call__(self, turn: int) -> None:
        """Takes the step of one turn."""
        self.wrapper.forward_logits = self._forward_logits
        self.wrapper.fit([self.batches[turn % len(self.batches)]], None)

    def _forward_logits(self, *arguments: Any, **options: Any) -> Tensor:
        with autocast(self.device, self.precision):
            logits = type(self.wrapper).forward_logits(self.wrapper, *arguments, **options)
        return logits.float()


def official_step(
    cls: type, base: nn.Module, prompts: Prompts, rank: int, precision: str
) -> OfficialStep:
    """The authors' step over a base model on the batches of `prompts`.

    Args:
        cls: of `official_class`.
        base: a model without adapters; a copy that no other subject uses.
        prompts: the batches.
        rank: of the adapters on q_proj and v_proj.
        precision: see `autocast`.
    """
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    device = next(base.parameters()).device
    rows, options = prompts.batches[0]["option_mask"].shape
    tokens = prompts.scorer.tokens[:options]
    wrapper = cls(base, config, settings(rows, len(tokens)), one_process(device)).train()
    wrapper.target_ids, wrapper.M, wrapper.wandb_logger = (
        torch.tensor(tokens, device=device),
        100,
        None,
    )
    names = ("input_ids", "attention_mask", "position_ids")
    batches = [
        (
            {**{name: batch[name] for name in names}, "use_cache": False},
            batch["labels"],
            batch["labels"],
        )
        for batch in prompts.batches
    ]
    return OfficialStep(wrapper, batches, device, precision)
