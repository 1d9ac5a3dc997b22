"""Maximum likelihood, stopped where held-out rows say: the plain rival of every posterior."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from bayestune.decisions import predictive_nll
from bayestune.errors import COUNT, check_fields
from bayestune.forward import Draws
from bayestune.methods.held_out import held_out_logits, held_out_rows
from bayestune.posteriors import Point
from bayestune.runtime import is_first_process
from bayestune.scoring import Scorer
from bayestune.training import Training, fit_adapter
from bayestune.whole_files import replaced, write_text_whole

_WEIGHTS = "best.safetensors"
_LOSSES = "best.json"


class KeepBest(TrainerCallback):
    """Measures the held-out NLL every few steps, and ends with the weights of the smallest.

    The losses and these weights are kept beside the checkpoints, so that a resumed run has them.
    """

    def __init__(self, scorer: Scorer, every: int, folder: Path | None, *, bf16: bool) -> None:
        self.rows = held_out_rows(scorer, "EarlyStopping")
        self.scorer = scorer
        self.every = every
        self.folder = folder
        self.draws = Draws(0, bf16=bf16)
        self.losses: dict[int, float] = {}
        self._best: dict[str, Tensor] = {}

    @property
    def step(self) -> int:
        """The step of the least held-out NLL."""
        return min(self.losses, key=self.losses.__getitem__)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Loads what a resumed run had measured up to its checkpoint; a new run removes it."""
        if self.folder and not state.global_step and is_first_process():
            for name in (_LOSSES, _WEIGHTS):
                (self.folder / name).unlink(missing_ok=True)
        if self.folder and state.global_step and (self.folder / _LOSSES).is_file():
            losses = json.loads((self.folder / _LOSSES).read_text(encoding="utf-8"))
            by_step = {int(step): loss for step, loss in losses.items()}
            self.losses = {step: by_step[step] for step in by_step if step <= state.global_step}
            self._best = load_file(self.folder / _WEIGHTS)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measures, every few steps and at the last one."""
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._measure(kwargs["model"], state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Puts the best weights back."""
        if state.global_step < state.max_steps:
            return  # interrupted: the checkpoint must go on from the weights it stopped at
        with torch.no_grad():
            for name, parameter in _trained(kwargs["model"]).items():
                parameter.copy_(self._best[name])

    def _measure(self, model: nn.Module, step: int) -> None:
        posterior = Point(model, self.scorer)
        logits, labels = held_out_logits(posterior, self.scorer, self.rows, self.draws)
        loss = predictive_nll(logits.double(), labels).item()
        if loss < min(self.losses.values(), default=float("inf")):
            trained = _trained(model)
            self._best = {name: value.detach().cpu().clone() for name, value in trained.items()}
        self.losses[step] = loss
        if self.folder and is_first_process():
            self.folder.mkdir(parents=True, exist_ok=True)
            with replaced(self.folder / _WEIGHTS) as scratch:
                save_file(self._best, scratch)
            write_text_whole(self.folder / _LOSSES, json.dumps(self.losses))


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


@dataclass(frozen=True)
class EarlyStopping:
    """Plain LoRA with the weights of the step whose held-out NLL is least.

    The run has its whole schedule of learning rates, and the last step is always measured.

    Args:
        every: steps between two measurements.

    Raises:
        Refusal: if `every` is not positive; without held-out rows.

    Reference:
        Prechelt: Early stopping, but when?, 1998,
        https://doi.org/10.1007/3-540-49430-8_3.
    """

    every: int = 15

    def __post_init__(self) -> None:
        check_fields(self, every=COUNT)

    def fit(self, model: nn.Module, scorer: Scorer, training: Training) -> Point:
        """Trains an adapter and takes its best step."""
        best = KeepBest(scorer, self.every, training.output, bf16=training.bf16)
        adapted, report = fit_adapter(model, scorer, training, [best])
        chosen = {"best_step": best.step, "nll_by_step": best.losses}
        return Point(adapted, scorer, report=report.plus(**chosen))
