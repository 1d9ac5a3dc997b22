"""What `gpu.py` measures: one function a section, and how the time is shared out among them."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bayestune.adapters import gaussian_layers
from bayestune.forward import Draws
from draws import MEAN, ONE, SEPARATE
from gpu_budget import Pace, UnfitError
from gpu_subject import OURS, Subject, checkpointed
from harness import Case, Spread, timed_case
from memory import MIB, persistent_bytes, step_peak
from subjects import STOCK, TrainingStep, task_loss, training_step

STEP_BAR, MEMORY_BAR, DRAWS_BAR = 1.02, 1.01, 4.0
CONTROL, PUBLISHED = "lora again", "lora, published form"
DRAWS, BARRED_ROWS = 10, 4  # the bar on draws holds for batches up to this size
ALIKE = 0.5  # of the draws' spread: rounding stays far below, other draws would be at 1.4


def train(subject: Subject, pace: Pace, rows: int, checkpointing: bool = False) -> list[Case]:
    """BLoB's step over stock LoRA's, and a second stock LoRA's if asked for."""
    names = [OURS, STOCK, *([CONTROL] if subject.options.control else [])]
    steps = subject.steps(rows, names)
    with checkpointed((step.model for step in steps.values()), checkpointing):
        seconds = pace.interleave(steps)
    how = f"{subject.size(rows)}{', gradient checkpointing' if checkpointing else ''}"
    cases = [timed_case(f"BLoB step / stock LoRA step, {how}", seconds, (OURS, STOCK), STEP_BAR)]
    if subject.options.control:
        cases.append(
            timed_case(f"stock LoRA again / stock LoRA, {how}", seconds, (CONTROL, STOCK), None)
        )
    return cases


def memory(subject: Subject, pace: Pace, rows: int) -> list[Case]:
    """Peak memory of the same, with and without gradient checkpointing."""
    cases, steps = [], subject.steps(rows)
    for checkpointing in (False, True):
        with checkpointed((step.model for step in steps.values()), checkpointing):
            for _ in range(max(1, pace.warmup)):  # the optimiser's state is made in the first step
                for step in steps.values():
                    step(0)
            peaks = {
                name: (persistent_bytes(step) + step_peak(step)) / MIB
                for name, step in steps.items()
            }
        how = f"{subject.size(rows)}{', gradient checkpointing' if checkpointing else ''}"
        ratio = Spread.of([peaks[OURS] / peaks[STOCK]])
        cases.append(
            Case(
                f"BLoB peak memory / stock LoRA peak memory, {how}", ratio, MEMORY_BAR, peaks, "MiB"
            )
        )
    return cases


def launches(step: TrainingStep) -> int:
    """Kernels that a step launches; without CUDA, the operators that it calls."""
    cuda = step.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as record:
        step(0)
        if cuda:
            torch.cuda.synchronize(step.device)
    names = [event.name for event in record.events()]
    return sum("LaunchKernel" in name if cuda else name.startswith("aten::") for name in names)


def launch_counts(subject: Subject, pace: Pace, rows: int) -> list[Case]:
    """What BLoB's step launches more than stock LoRA's, per adapted layer."""
    steps = subject.steps(rows)
    for step in steps.values():
        for _ in range(max(1, pace.warmup)):
            step(0)
    launches(steps[STOCK])  # a process's first profile also records its own set-up
    counts = {name: float(launches(step)) for name, step in steps.items()}
    if not counts[STOCK]:
        raise UnfitError(
            "the profiler recorded no launches: it may not be permitted on this machine"
        )
    layers = len(gaussian_layers(subject.model(OURS)))
    more = (counts[OURS] - counts[STOCK]) / layers
    what = "kernel launches" if subject.device.type == "cuda" else "operator calls"
    amounts = {**counts, "adapted layers": float(layers), "more per adapted layer": more}
    name = f"BLoB {what} / stock LoRA {what} in a step, {subject.size(rows)}"
    return [Case(name, Spread.of([counts[OURS] / counts[STOCK]]), None, amounts, what)]


def check(one: Tensor, other: Tensor) -> None:
    """Refuses draws that are all alike, and two ways of computing them that differ by more than rounding.

    Raises:
        AssertionError: if either is so.
    """
    spread, gap = (
        one.std(0).square().mean().sqrt().item(),
        (one - other).square().mean().sqrt().item(),
    )
    if not spread > 0:
        raise AssertionError("the draws are all alike: no noise reached the adapters")
    if not gap <= ALIKE * spread:
        raise AssertionError(
            f"one pass and separate passes disagree: got a gap of {gap:.3g}, the spread is {spread:.3g}"
        )


def task(subject: Subject, pace: Pace, rows: int) -> list[Case]:
    """Our task step over the published form's and over stock LoRA's, on random prompts of four options."""
    try:
        published = importlib.import_module("published")
    except ModuleNotFoundError as error:
        raise UnfitError(f"the published form is not there: {error}") from error
    prompts, model = subject.prompts(rows), subject.adapted(PUBLISHED)
    noisy, loss = published.publish(model), task_loss(prompts)
    steps: dict[str, Any] = {
        name: training_step(subject.model(name), name, loss, "bf16") for name in (OURS, STOCK)
    }
    steps[PUBLISHED] = published.published_step(
        model, noisy, published.answer_loss(prompts), "bf16"
    )
    seconds, size = pace.interleave(steps), subject.size(rows)
    return [
        timed_case(f"BLoB task step / published form, {size}", seconds, (OURS, PUBLISHED), None),
        timed_case(
            f"BLoB task step / stock LoRA, last logits, {size}", seconds, (OURS, STOCK), None
        ),
    ]


def exact_draws(subject: Subject, pace: Pace, rows: int) -> list[Case]:
    """Ten held draws in one pass, in ten, and the mean."""
    score = subject.scored(rows)
    ways = {ONE: Draws(DRAWS), SEPARATE: Draws(DRAWS, max_rows=rows), MEAN: Draws(0)}
    check(score(ways[ONE]), score(ways[SEPARATE]))  # also makes the draws, before the clock runs
    seconds = pace.interleave(
        {name: lambda _, draws=draws: score(draws) for name, draws in ways.items()}
    )
    size, bar = subject.size(rows), DRAWS_BAR if rows <= BARRED_ROWS else None
    return [
        timed_case(f"{DRAWS} exact draws / mean's pass, {size}", seconds, (ONE, MEAN), bar),
        timed_case(
            f"{DRAWS} exact draws in one pass / in {DRAWS} passes, {size}",
            seconds,
            (ONE, SEPARATE),
            None,
        ),
        timed_case(f"{DRAWS} passes / mean's pass, {size}", seconds, (SEPARATE, MEAN), None),
    ]


def shared_draws(
    subject: Subject, pace: Pace, rows: int, lasts: tuple[int, ...] = (1, 16)
) -> list[Case]:
    """Ten draws of the last m tokens only, over the mean's pass and over ten exact draws."""
    if "shared_prefix" not in {field.name for field in fields(Draws)}:
        raise UnfitError("this version of bayestune has no shared-prefix draws")
    score = subject.scored(rows)
    made: dict[str, Any] = {f"m={m}": Draws(DRAWS, **{"shared_prefix": m}) for m in lasts}
    ways = {**made, ONE: Draws(DRAWS), MEAN: Draws(0)}
    for draws in ways.values():
        score(draws)  # makes the draws
    seconds = pace.interleave(
        {name: lambda _, draws=draws: score(draws) for name, draws in ways.items()}
    )
    return [
        timed_case(
            f"{DRAWS} shared-prefix draws, {name} / {text}, {subject.size(rows)}",
            seconds,
            (name, base),
            None,
        )
        for name in made
        for base, text in ((MEAN, "mean's pass"), (ONE, f"{DRAWS} exact draws"))
    ]


@dataclass(frozen=True)
class Section:
    """A part of the run: its weight in sharing out the time, and what measures it."""

    weight: float
    run: Callable[[Subject, Pace], list[Case]]


SECTIONS = {  # what matters most comes first
    "train-4": Section(4, partial(train, rows=4)),
    "train-1": Section(3, partial(train, rows=1)),
    "memory": Section(1, partial(memory, rows=4)),
    "draws-1": Section(1, partial(exact_draws, rows=1)),
    "draws-2": Section(1, partial(exact_draws, rows=2)),
    "draws-4": Section(1.5, partial(exact_draws, rows=4)),
    "draws-8": Section(2, partial(exact_draws, rows=8)),
    "launches": Section(1, partial(launch_counts, rows=4)),
    "task-4": Section(2, partial(task, rows=4)),
    "checkpointing-4": Section(2, partial(train, rows=4, checkpointing=True)),
    "shared-1": Section(1, partial(shared_draws, rows=1)),
    "shared-4": Section(1, partial(shared_draws, rows=4)),
}
