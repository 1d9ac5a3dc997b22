"""SWAG: a Gaussian through the iterates of the optimiser at a constant learning rate."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from bayestune.adapters import PREFIX, Slots
from bayestune.errors import COUNT, NUMERIC, Refusal, check_fields
from bayestune.posteriors import LowRank
from bayestune.scoring import Scorer
from bayestune.training import Training, fit_adapter
from bayestune.whole_files import replaced

FILE = "swag.safetensors"


@dataclass(eq=False)
class Collector(TrainerCallback):
    """Keeps the learning rate constant from a step on, and then collects one iterate in every c.

    Each checkpoint holds their mean θ̄_n = θ̄_{n−1} + (θ_n − θ̄_{n−1})/n, their mean square about θ̄_n
    and the last K of θ_i − θ̄_i.

    Args:
        start: the last step before the learning rate is constant.
        every: c, in steps.
        rank: K.
        rate: the constant learning rate over the run's own at its peak.
    """

    start: int
    every: int
    rank: int
    rate: float
    kept_file: ClassVar[str] = FILE  # which a checkpoint must have to go on from it

    def __post_init__(self) -> None:
        self.count = 0
        self.means: dict[str, Tensor] = {}
        # Σ (θ_i − θ̄)², summed as Welford does, because E[θ²] − E[θ]² would cancel
        self.squares: dict[str, Tensor] = {}
        self.deviations: dict[str, list[Tensor]] = {}

    @torch.no_grad()
    def collect(self, model: nn.Module) -> None:
        """Takes the trainable parameters as one more iterate."""
        self.count += 1
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self._add(name, parameter.detach().float())

    def _add(self, name: str, value: Tensor) -> None:
        if name not in self.means:
            self.means[name] = torch.zeros_like(value)
            self.squares[name] = torch.zeros_like(value)
            self.deviations[name] = []
        mean = self.means[name]
        from_old_mean = value - mean
        mean.add_(from_old_mean, alpha=1 / self.count)
        self.squares[name].addcmul_(from_old_mean, value - mean)
        self.deviations[name].append(value - mean)
        del self.deviations[name][: -self.rank]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Makes the schedule constant from the start on; a resumed run loads what was collected."""
        wrapper = kwargs["lr_scheduler"]
        scheduler = getattr(wrapper, "scheduler", wrapper)  # accelerate wraps torch's scheduler
        scheduler.lr_lambdas = [self._constant_after(given) for given in scheduler.lr_lambdas]
        if state.global_step >= self.start + self.every:
            self._load(_file(args, state), next(kwargs["model"].parameters()).device)

    def _constant_after(self, schedule: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: schedule(step) if step < self.start else self.rate

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Collects if it is time."""
        after = state.global_step - self.start
        if after > 0 and after % self.every == 0:
            self.collect(kwargs["model"])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes what was collected into the checkpoint."""
        tensors = {"count": torch.tensor(self.count)}
        for name, mean in self.means.items():
            tensors[f"mean/{name}"] = mean
            tensors[f"squares/{name}"] = self.squares[name]
            tensors[f"deviations/{name}"] = torch.stack(self.deviations[name])
        if state.is_world_process_zero:
            with replaced(_file(args, state)) as scratch:
                save_file(tensors, scratch)

    def _load(self, path: Path, device: torch.device) -> None:
        if not path.is_file():
            raise Refusal(
                f"SWAG cannot go on from this checkpoint: got no {path}, expected the iterates "
                "collected so far; start anew, or from a checkpoint that SWAG wrote"
            )
        tensors = load_file(path, device=str(device))
        self.count = int(tensors.pop("count"))
        for key, mean in tensors.items():
            part, _, name = key.partition("/")
            if part == "mean":
                self.means[name] = mean
                self.squares[name] = tensors[f"squares/{name}"]
                self.deviations[name] = list(tensors[f"deviations/{name}"])


def _file(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE


@dataclass(frozen=True)
class SWAG:
    """Trains as maximum likelihood does, then takes a Gaussian through iterates at a constant rate.

    The iterates are AdamW's, as for LoRA in the second reference, whose settings are the defaults.
    Unlike there, the first phase keeps the run's own schedule, the rate changes at once, no best
    checkpoint is sought, and a run with few epochs collects more often. A head that is trained
    whole is set to its mean.

    Args:
        start: the part of the steps before the learning rate is constant, in [0, 1).
        rate: the constant learning rate over that of the training at its peak.
        rank: K ≥ 2, how many deviations span the low-rank part.
        every: c, steps between iterates; None for an epoch, or less so that there are 2·K iterates.

    Raises:
        Refusal: if a value is out of range.

    Reference:
        Maddox, Garipov, Izmailov, Vetrov, Wilson: SWAG, NeurIPS 2019,
        https://arxiv.org/abs/1902.02476; for LoRA Onal, Flöge, Caldwell, Sheverdin, Fortuin, 2024,
        https://arxiv.org/abs/2405.03425.
    """

    start: float = 8 / 15
    rate: float = 0.1
    rank: int = 5
    every: int | None = None

    def __post_init__(self) -> None:
        check_fields(self, start=NUMERIC, rate=NUMERIC, rank=NUMERIC, every=COUNT)
        too_often = self.every is not None and self.every < 1
        if not 0 <= self.start < 1 or self.rate <= 0 or self.rank < 2 or too_often:
            raise Refusal(
                f"out of range: got {self}, expected start in [0, 1), rate > 0, rank ≥ 2 and "
                "every ≥ 1; correct it"
            )

    def fit(self, model: nn.Module, scorer: Scorer, training: Training) -> LowRank:
        """Trains an adapter and leaves it at the mean of the iterates."""
        collector = self.collector(training, len(scorer.task.train))
        adapted, report = fit_adapter(model, scorer, training, [collector])
        with torch.no_grad():
            for name, mean in collector.means.items():
                adapted.get_parameter(name).copy_(mean)
        slots = Slots(adapted)
        variances = {}
        deviations = {}
        for slot in slots.modules():
            name = f"{PREFIX}{slot}.{slots.adapter}.weight"
            variances[slot] = collector.squares[name] / collector.count
            deviations[slot] = torch.stack(collector.deviations[name])
        report = report.plus(iterates=collector.count)
        return LowRank(adapted, scorer, variances, deviations, report=report)

    def collector(self, training: Training, num_rows: int) -> Collector:
        """The callback that collects the iterates of a run.

        Args:
            training: of the run.
            num_rows: its training rows.

        Raises:
            Refusal: if the run is too short for two iterates.
        """
        steps = training.total_steps(num_rows)
        start = int(self.start * steps)
        epoch = math.ceil(num_rows / (training.batch_size * training.accumulation))
        every = self.every or max(1, min(epoch, (steps - start) // (2 * self.rank)))
        count = (steps - start) // every
        if count < 2:
            raise Refusal(
                f"SWAG needs two iterates: got {count} in {steps - start} steps, one in every "
                f"{every}, expected at least 2; train longer, start earlier or collect more often"
            )
        return Collector(start, every, self.rank, self.rate)
