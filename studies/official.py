"""The authors' own code as a reference point, from a checkout that the user has.

Modules of the checkout are imported with what they need; `OfficialStep` has `modelwrappers/blob.py`
take its steps, `official_runs.py` whole fits. Nothing of it is in this repository, and nothing is
written to the checkout.
"""

import importlib
import math
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from tqdm import tqdm

from subjects import MANY_STEPS, TARGETS, Prompts, autocast
from task_step import INPUTS

REPOSITORY = "https://github.com/Wang-ML-Lab/bayesian-peft"
FILE = Path("modelwrappers/blob.py")
# What its imports ask for and a training step does without: a debugger, metrics, 8-bit layers.
ABSENT = {
    "ipdb": (),
    "torchmetrics": ("Accuracy", "CalibrationError"),
    "peft.tuners.lora.bnb": ("Linear8bitLt",),
}


def _stand_in(name: str) -> None:
    """Puts a module of empty classes in the place of one that is not installed."""
    try:
        importlib.import_module(name)
    except ImportError:
        sys.modules[name] = ModuleType(name)
        for cls in ABSENT[name]:
            setattr(sys.modules[name], cls, type(cls, (), {}))


def official_module(folder: Path, name: str) -> Any:
    """A module of a checkout, whose folder stays on the path.

    Raises:
        ValueError: if `folder` is not a checkout of the authors' repository.
    """
    if not (folder / FILE).is_file():
        raise ValueError(
            f"--official: got {folder}, which has no {FILE}, expected a checkout; clone "
            f"{REPOSITORY} and give its folder"
        )
    for absent in ABSENT:
        _stand_in(absent)
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True
    module: Any = importlib.import_module(name)
    if hasattr(module, "tqdm"):
        module.tqdm = partial(tqdm, disable=True)
    return module


def official_class(folder: Path) -> type:
    """The class `BLoB` of a checkout, see `official_module`."""
    return official_module(folder, ".".join(FILE.with_suffix("").parts)).BLoB


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
    """What their code asks of an accelerator, for one process that prints and logs nothing."""
    return Namespace(
        device=device,
        num_processes=1,
        is_local_main_process=False,
        wait_for_everyone=lambda: None,
        prepare=lambda *prepared: prepared,
        backward=lambda loss: loss.backward(),
        gather=lambda values: values,
    )


class OfficialStep:
    """One step of the authors' `fit`, on a loader of one batch.

    Args:
        cls: the class of `official_class`.
        base: a model without adapters; a copy that no other subject uses.
        prompts: the batches.
        rank: of the adapters on q_proj and v_proj.
        precision: see `autocast`.
    """

    def __init__(
        self, cls: type, base: nn.Module, prompts: Prompts, rank: int, precision: str
    ) -> None:
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS), task_type="CAUSAL_LM"
        )
        rows, options = prompts.batches[0]["option_mask"].shape
        tokens = prompts.scorer.tokens[:options]  # type: ignore[union-attr]
        self.device = next(base.parameters()).device
        self.precision = precision
        accelerator = one_process(self.device)
        self.wrapper = cls(base, config, settings(rows, len(tokens)), accelerator).train()
        self.wrapper.target_ids = torch.tensor(tokens, device=self.device)
        self.wrapper.M = 100  # the period of the KL, as for all
        self.wrapper.wandb_logger = None
        self.wrapper.forward_logits = self._forward_logits
        self.batches = []
        for batch in prompts.batches:
            inputs = {**{name: batch[name] for name in INPUTS}, "use_cache": False}
            self.batches.append((inputs, batch["labels"], batch["labels"]))

    def __call__(self, turn: int) -> None:
        """Takes the step of one turn."""
        self.wrapper.fit([self.batches[turn % len(self.batches)]], None)

    def _forward_logits(self, *arguments: Any, **options: Any) -> Tensor:
        with autocast(self.device, self.precision):
            logits = type(self.wrapper).forward_logits(self.wrapper, *arguments, **options)
        return logits.float()
