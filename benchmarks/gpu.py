"""Everything that a CUDA machine can tell, in one command of at most eight minutes.

Llama-2-7B and Llama-3.1-8B geometries with random bfloat16 weights: no files and no network. Each
section has a share of `--seconds`; its turns are as many as fit, `--repeats` at most; what does not
fit is left out with its reason. Each section's line is written to `--json` when it is measured.
"""

import gc
import sys
import time
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import is_flash_attn_2_available

import draws as held
from bayestune.adapters import GaussianLinear, Slots
from bayestune.posteriors import Gaussian
from harness import (
    Action,
    Case,
    Spread,
    device_of,
    environment,
    interleave,
    parser_of,
    ratio_case,
    report,
)
from memory import MIB, persistent_bytes, step_peak
from subjects import (
    OURS,
    SIZES,
    STOCK,
    Batch,
    Loss,
    TrainingStep,
    adapt,
    random_tokens,
    token_loss,
    training_step,
    twin,
)

FLASH = "flash_attention_2"
DRAWS = 10
USABLE = 0.92  # of the seconds asked for: the rest is for imports and for what a section runs over
FEWEST = 6  # turns: fewer give no interval of the median
Clock = Callable[[], float]
GEOMETRIES = {  # in the order of SIZES
    "llama2-7b": (32000, 4096, 11008, 32, 32, 32),
    "llama31-8b": (128256, 4096, 14336, 32, 32, 8),
    "tiny": (128, 32, 64, 2, 4, 2),
}


# Time


class UnfitError(Exception):
    """A section cannot be measured here; says why."""


@dataclass(frozen=True)
class Pace:
    """What a section may take.

    Args:
        deadline: when it should be done, on the clock.
        most: turns at most.
        warmup: turns that are thrown away.
        device: synchronised around each action.
        clock: in seconds.
    """

    deadline: float
    most: int
    warmup: int
    device: torch.device
    clock: Clock = time.perf_counter

    def interleave(self, actions: Mapping[str, Action]) -> dict[str, list[float]]:
        """Seconds of each action in as many turns as fit; three turns before show how many do.

        Raises:
            UnfitError: if fewer turns fit than an interval of the median needs.
        """
        turns = partial(interleave, actions, device=self.device, clock=self.clock)
        turn = sum(laps[-1] for laps in turns(3, warmup=0).values())  # the first loads kernels
        left = self.deadline - self.clock()
        fit = int(left / turn) - self.warmup
        if fit < min(FEWEST, self.most):
            raise UnfitError(f"a turn takes {turn:.3g} s, and {max(0.0, left):.3g} s are left")
        return turns(min(self.most, fit), warmup=self.warmup)


# Models


def random_model(geometry: str, device: torch.device) -> nn.Module:
    """A Llama of the geometry, bfloat16 weights drawn on the device itself, the head not tied."""
    sizes = dict(zip(SIZES, GEOMETRIES[geometry], strict=True))
    config = LlamaConfig(**sizes, tie_word_embeddings=False)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


class Subject:
    """A geometry's models over one set of base weights, each made when a section asks for it."""

    def __init__(self, geometry: str, options: Namespace, device: torch.device) -> None:
        self.geometry = geometry
        self.options = options
        self.device = device
        self._models: dict[str, PeftModel] = {}

    @cached_property
    def base(self) -> nn.Module:
        """The base model; adapters go to its twins only."""
        return random_model(self.geometry, self.device)

    def model(self, name: str) -> PeftModel:
        """The adapted model of a name, in training mode: stock LoRA, or BLoB with that noise."""
        if name not in self._models:
            base = twin(self.base)
            self._models[name] = adapt(base, name, self.options.rank, self.options.targets)
        return self._models[name]

    def tokens(self, rows: int) -> Tensor:
        """A batch of random tokens."""
        vocabulary, *_ = GEOMETRIES[self.geometry]
        return random_tokens(vocabulary, rows, self.options.length, self.device)

    def steps(self, loss: Loss, names: Iterable[str] = (OURS, STOCK)) -> dict[str, TrainingStep]:
        """Training steps in autocast."""
        return {name: training_step(self.model(name), name, loss, "bf16") for name in names}

    @cached_property
    def posterior(self) -> Gaussian:
        """A posterior as if trained."""
        base = twin(self.base)
        adapted = adapt(base, OURS, self.options.rank, self.options.targets)
        return Gaussian(held.as_if_trained(adapted), held.first_four)

    def size(self, rows: int) -> str:
        """A batch as text."""
        return f"{rows}×{self.options.length} tokens"


@contextmanager
def attention(models: Iterable[nn.Module], name: str) -> Iterator[None]:
    """The models' attention function for the time of the context."""
    bases: list[Any] = [model.get_base_model() for model in models]  # type: ignore[operator]
    before = [base.config._attn_implementation for base in bases]
    try:
        for base in bases:
            base.set_attn_implementation(name)
        yield
    finally:
        for base, old in zip(bases, before, strict=True):
            base.set_attn_implementation(old)


# Sections


def train(subject: Subject, pace: Pace, rows: int) -> list[Case]:
    """BLoB's step over stock LoRA's."""
    seconds = pace.interleave(subject.steps(token_loss(subject.tokens(rows), "last")))
    title = f"BLoB step / stock LoRA step, {subject.size(rows)}"
    return [ratio_case(title, seconds, (OURS, STOCK))]


def memory(subject: Subject, pace: Pace, rows: int) -> list[Case]:
    """Peak memory of the same."""
    steps = subject.steps(token_loss(subject.tokens(rows), "last"))
    warm_up(steps.values(), pace)
    peaks = {}
    for name, step in steps.items():
        peaks[name] = [(persistent_bytes(step) + step_peak(step)) / MIB]
    title = f"BLoB peak memory / stock LoRA peak memory, {subject.size(rows)}"
    return [ratio_case(title, peaks, (OURS, STOCK), "MiB")]


def warm_up(steps: Iterable[TrainingStep], pace: Pace) -> None:
    """Takes steps that do not count: the first one makes the optimiser's state."""
    for step in steps:
        for turn in range(max(1, pace.warmup)):
            step(turn)


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
    steps = subject.steps(token_loss(subject.tokens(rows), "last"))
    warm_up(steps.values(), pace)
    launches(steps[STOCK])  # a process's first profile also records its own set-up
    counts = {name: float(launches(step)) for name, step in steps.items()}
    if not counts[STOCK]:
        raise UnfitError("the profiler recorded no launches: it may not be permitted here")
    layers = float(len(Slots(subject.model(OURS)).of_kind(GaussianLinear)))
    more = (counts[OURS] - counts[STOCK]) / layers
    what = "kernel launches" if subject.device.type == "cuda" else "operator calls"
    amounts = {**counts, "adapted layers": layers, "more per adapted layer": more}
    name = f"BLoB {what} / stock LoRA {what} in a step, {subject.size(rows)}"
    return [Case(name, Spread.of([counts[OURS] / counts[STOCK]]), amounts, what)]


def draw_ways(subject: Subject, batch: Batch) -> dict[str, Action]:
    """Ten held draws in one pass, in ten, and the mean; refuses draws that disagree.

    Raises:
        UnfitError: if the draws do not share a pass.
    """
    one = held.Subject(subject.posterior, [batch], subject.device, "bf16")
    ways = one.ways(DRAWS, len(batch["input_ids"]))
    held.check(ways[held.ONE](0), ways[held.SEPARATE](0), "bf16")
    passes: list[int] = []
    hook = subject.posterior.model.register_forward_pre_hook(lambda *_: passes.append(1))
    ways[held.ONE](0)  # the passes that compare are behind it
    hook.remove()
    if len(passes) > 1:
        raise UnfitError(f"{DRAWS} draws took {len(passes)} passes, where one should do")
    return ways


def exact_draws(subject: Subject, pace: Pace, rows: int) -> list[Case]:
    """Ten held draws in one pass, in ten, and the mean."""
    seconds = pace.interleave(draw_ways(subject, {"input_ids": subject.tokens(rows)}))
    lines = {
        f"{DRAWS} exact draws / mean's pass": (held.ONE, held.MEAN),
        f"{DRAWS} exact draws in one pass / in {DRAWS} passes": (held.ONE, held.SEPARATE),
        f"{DRAWS} passes / mean's pass": (held.SEPARATE, held.MEAN),
    }
    size = subject.size(rows)
    return [ratio_case(f"{name}, {size}", seconds, pair) for name, pair in lines.items()]


def left_padded(ids: Tensor) -> Batch:
    """The rows with padding in front: the first has none, half of the last is padding."""
    rows, length = ids.shape
    begins = torch.linspace(0, length // 2, rows, device=ids.device).long()
    places = torch.arange(length, device=ids.device)
    return {"input_ids": ids, "attention_mask": (places >= begins[:, None]).long()}


def padding(subject: Subject, pace: Pace, rows: int, way: str = "sdpa") -> list[Case]:
    """Steps on left-padded rows under an attention function; its draws are checked before.

    Raises:
        UnfitError: if flash attention is asked for and not there.
    """
    if way == FLASH and not is_flash_attn_2_available():
        raise UnfitError("the package flash-attn is not installed, or there is no GPU for it")
    ids = subject.tokens(rows)
    batch = left_padded(ids)
    targets = ids[:, -1].roll(1)

    def loss(model: nn.Module, _: int) -> Tensor:
        logits = model(**batch, use_cache=False, logits_to_keep=1).logits
        return F.cross_entropy(logits[:, -1].float(), targets)

    steps = subject.steps(loss)
    full = subject.steps(token_loss(ids, "last"), [OURS])[OURS]
    models = [subject.posterior.model, *(step.model for step in steps.values())]
    with attention(models, way):
        draw_ways(subject, batch)
        seconds = pace.interleave({**steps, "full rows": full})
    how = f"{way}, {subject.size(rows)}"
    return [
        ratio_case(f"BLoB step / stock LoRA step, padded rows, {how}", seconds, (OURS, STOCK)),
        ratio_case(f"BLoB step, padded rows / full rows, {how}", seconds, (OURS, "full rows")),
    ]


Section = Callable[[Subject, Pace], list[Case]]
SECTIONS: dict[str, Section] = {  # what matters most comes first
    "train-4": partial(train, rows=4),
    "train-1": partial(train, rows=1),
    "memory": partial(memory, rows=4),
    "draws-1": partial(exact_draws, rows=1),
    "draws-2": partial(exact_draws, rows=2),
    "draws-4": partial(exact_draws, rows=4),
    "draws-8": partial(exact_draws, rows=8),
    "launches": partial(launch_counts, rows=4),
    "padding-4": partial(padding, rows=4),
    "flash-4": partial(padding, rows=4, way=FLASH),
}


# The command


def parser() -> ArgumentParser:
    """The command's options."""
    made = parser_of(__doc__, repeats=400)
    made.set_defaults(device="cuda", warmup=1)  # the probing turns have warmed up already
    add = made.add_argument
    geometries = ["llama2-7b", "llama31-8b"]
    sections = list(SECTIONS)
    targets = ["q_proj", "v_proj", "lm_head"]
    add("--geometry", choices=list(GEOMETRIES), nargs="+", default=geometries, help="each measured")
    add("--sections", choices=sections, nargs="+", default=sections, help="each a line")
    add("--seconds", type=float, default=480.0, help="of wall time, for all")
    add("--rank", type=int, default=8, help="of the adapters")
    add("--targets", nargs="+", default=targets, help="adapted modules")
    add("--length", type=int, default=128, help="tokens of a row")
    return made


def measure(name: str, subject: Subject, pace: Pace, where: Mapping[str, Any]) -> None:
    """Measures a section; reports it as a run whose options name this geometry and section.

    Raises:
        UnfitError: if no time is left, or the section says so.
    """
    if pace.clock() >= pace.deadline:
        raise UnfitError("no time is left; give it more --seconds, or fewer --sections")
    options = subject.options
    cases = SECTIONS[name](subject, pace)
    own = Namespace(**{**vars(options), "geometry": [subject.geometry], "sections": [name]})
    adapters = f"rank {options.rank} on {', '.join(options.targets)}"
    title = f"{subject.geometry} geometry, random bf16 weights, {adapters}"
    report("gpu", title, cases, own, where)
    sys.stdout.flush()


def release() -> None:
    """Gives the memory of what is not referred to any more back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run(options: Namespace, clock: Clock = time.perf_counter) -> list[str]:
    """Measures every section of every geometry within the time.

    Returns:
        The sections that failed; those left out for lack of time are not among them.
    """
    end = clock() + USABLE * options.seconds
    device = device_of(options)
    where = environment(device)
    failed = []
    left = len(options.geometry) * len(options.sections)
    for geometry in options.geometry:
        subject = Subject(geometry, options, device)
        for name in options.sections:
            begin = clock()
            deadline = begin + (end - begin) / left  # what a section saves the later ones have
            pace = Pace(deadline, options.repeats, options.warmup, device, clock)
            left -= 1
            try:
                measure(name, subject, pace, where)
                print(f"{geometry} {name}: {clock() - begin:.1f} s\n")
            except UnfitError as reason:
                print(f"{geometry} {name} left out: {reason}\n")
            except Exception as error:  # such as too little memory: the others can be measured
                failed.append(f"{geometry} {name}")
                print(f"{geometry} {name} failed: {type(error).__name__}: {error}\n")
            release()
        del subject
        release()
    return failed


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and reports; exits with 1 if a section failed."""
    warnings.simplefilter("ignore", FutureWarning)  # names that only old transformers know
    made = parser()
    options = made.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        made.error(
            "no CUDA device: got --device cuda, expected a machine with one; give --device cpu "
            "to try it out"
        )
    if failed := run(options):
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
