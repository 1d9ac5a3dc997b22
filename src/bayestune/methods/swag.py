"""SWAG: a Gaussian through the iterates of the optimiser at a constant learning rate."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from bayestune.adapters import ADAPTER, PREFIX, Slots
from bayestune.posteriors import LowRank
from bayestune.scoring import Scorer
from bayestune.training import Training, start_adapter, train

FILE = "swag.safetensors"


class Collector(TrainerCallback):
    """Keeps the learning rate constant from a step on, and the iterates' moments from then, one in every c.

    With θ_n the n-th iterate: θ̄_n = θ̄_{n−1} + (θ_n − θ̄_{n−1})/n, v the mean square of θ_1 … θ_n about θ̄_n, and D the
    last K of θ_i − θ̄_i. They are saved in each checkpoint.

    Args:
        start: the last step before the learning rate is constant.
        every: c, in steps.
        rank: K.
        rate: the constant learning rate over the run's own at its peak.
    """

    def __init__(self, start: int, every: int, rank: int, rate: float) -> None:
        self.start, self.every, self.rank, self.rate = start, every, rank, rate
        self.count = 0
        self.means: dict[str, Tensor] = {}
        self.squares: dict[
            str, Tensor
        ] = {}  # Σ (θ_i − θ̄)², summed as Welford does: E[θ²] − E[θ]² would cancel
        self.deviations: dict[str, list[Tensor]] = {}

    @torch.no_grad()
    def collect(self, model: nn.Module) -> None:
        """Takes the trainable parameters as one more iterate."""
        self.count += 1
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                value = parameter.detach().float()
                mean = self.means.setdefault(name, torch.zeros_like(value))
                before = value - mean
                mean.add_(before, alpha=1 / self.count)
                self.squares.setdefault(name, torch.zeros_like(value)).addcmul_(
                    before, value - mean
                )
                kept = self.deviations.setdefault(name, [])
                kept.append(value - mean)
                del kept[: -self.rank]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Makes the schedule constant from the start on; when resuming, takes up what was collected.

        Raises:
            ValueError: if the checkpoint does not hold it.
        """
        scheduler = kwargs["lr_scheduler"]
        scheduler = getattr(
            scheduler, "scheduler", scheduler
        )  # accelerate wraps the torch scheduler
        scheduler.lr_lambdas = [
            lambda step, own=own: own(step) if step < self.start else self.rate
            for own in scheduler.lr_lambdas
        ]
        if state.global_step >= self.start + self.every:
            self._load(
                Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE, kwargs["model"]
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Collects, if it is time."""
        after = state.global_step - self.start
        if after > 0 and after % self.every == 0:
            self.collect(kwargs["model"])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes what was collected into the checkpoint."""
        tensors = {"count": torch.tensor(self.count)}
        tensors |= {f"mean/{name}": value for name, value in self.means.items()}
        tensors |= {f"squares/{name}": value for name, value in self.squares.items()}
        tensors |= {
            f"deviations/{name}": torch.stack(values) for name, values in self.deviations.items()
        }
        if state.is_world_process_zero:
            save_file(tensors, Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE)

    def _load(self, path: Path, model: nn.Module) -> None:
        if not path.is_file():
            raise ValueError(
                f"SWAG cannot go on from this checkpoint: got no {path}, expected the iterates collected so far; "
                "start anew, or from a checkpoint that SWAG wrote"
            )
        tensors = load_file(path, device=str(next(model.parameters()).device))
        self.count = int(tensors.pop("count"))
        for key, value in tensors.items():
            part, _, name = key.partition("/")
            if part == "deviations":
                self.deviations[name] = list(value)
            else:
                {"mean": self.means, "squares": self.squares}[part][name] = value


@dataclass(frozen=True)
class SWAG:
    """Trains as maximum likelihood does, goes on at a constant learning rate and takes a Gaussian through the iterates.

    Collected are the iterates of AdamW, as for LoRA in the second reference, not of SGD. Its settings are collecting
    from epoch 8 of 15 on, at a tenth of the learning rate, with 5 deviations and one iterate an epoch. Unlike there,
    the first phase keeps the run's own schedule, the rate changes at once, no best checkpoint is sought, and a run
    with few epochs collects more often. A head that is trained whole is set to its mean.

    Args:
        start: the part of the steps before the learning rate is constant, in [0, 1).
        rate: the constant learning rate over that of the training at its peak.
        rank: K ≥ 2, how many deviations span the low-rank part.
        every: c, steps from one iterate to the next; None for an epoch, or less so that there are 2·K iterates.

    Raises:
        ValueError: if a value is out of range.

    Reference:
        Maddox, Garipov, Izmailov, Vetrov, Wilson: SWAG, NeurIPS 2019, https://arxiv.org/abs/1902.02476; for LoRA
        Onal, Flöge, Caldwell, Sheverdin, Fortuin, 2024, https://arxiv.org/abs/2405.03425.
    """

    start: float = 8 / 15
    rate: float = 0.1
    rank: int = 5
    every: int | None = None

    def __post_init__(self) -> None:
        if (
            not 0 <= self.start < 1
            or self.rate <= 0
            or self.rank < 2
            or (self.every is not None and self.every < 1)
        ):
            raise ValueError(
                f"out of range: got {self}, expected start in [0, 1), rate > 0, rank ≥ 2 and every ≥ 1; correct it"
            )

    def fit(self, model: nn.Module, scorer: Scorer, training: Training) -> LowRank:
        """Trains a fresh adapter on `model` and leaves it at the mean of the iterates.

        Args:
            model: a transformers model without adapters.
            scorer: the task, bound to the model's tokenizer.
            training: the adapter and how it is trained.

        Raises:
            ValueError: if the steps suffice for fewer than two iterates.
        """
        collector = self._collector(training, len(scorer.task.train))
        adapted = start_adapter(model, training)
        report = train(adapted, scorer, training, [collector])
        with torch.no_grad():
            for name, mean in collector.means.items():
                adapted.get_parameter(name).copy_(mean)
        names = {f"{PREFIX}{slot}.{ADAPTER}.weight": slot for slot in Slots(adapted).modules()}
        variances = {
            slot: collector.squares[name] / collector.count for name, slot in names.items()
        }
        deviations = {slot: torch.stack(collector.deviations[name]) for name, slot in names.items()}
        return LowRank(
            adapted, scorer, variances, deviations, report=report.plus(iterates=collector.count)
        )

    def _collector(self, training: Training, num_rows: int) -> Collector:
        steps = training.total_steps(num_rows)
        start = int(self.start * steps)
        epoch = math.ceil(num_rows / (training.batch_size * training.accumulation))
        every = self.every or max(1, min(epoch, (steps - start) // (2 * self.rank)))
        if (steps - start) // every < 2:
            raise ValueError(
                f"SWAG needs two iterates: got {(steps - start) // every} in {steps - start} steps, one in every "
                f"{every}, expected at least 2; train longer, start earlier or collect more often"
            )
        return Collector(start, every, self.rank, self.rate)
