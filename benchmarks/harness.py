"""What every benchmark shares: interleaved timing, paired ratios, environment, table, record."""

import gc
import json
import math
import os
import platform
import subprocess
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bayestune.runtime import keep_freed_memory

Action = Callable[[int], object]  # does the work of one turn, whose number it is given
PACKAGES = ("torch", "transformers", "peft", "bayestune")


# Statistics


def quantile(values: Sequence[float], part: float) -> float:
    """The quantile of `values` by linear interpolation, `part` in [0, 1]."""
    ordered = sorted(values)
    place = part * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


@dataclass(frozen=True)
class Spread:
    """A median with an interval that holds the true median in 95 % of runs.

    The interval is the sign test's, from order statistics, and assumes nothing about the
    distribution. Fewer than six values allow no such interval: then it is the whole range.
    """

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of at least one value."""
        ordered = sorted(values)
        count = len(values)
        tail = 0.0
        cut = 0
        while cut < count // 2:
            tail += math.comb(count, cut) / 2**count
            if tail > 0.025:
                break
            cut += 1
        first = max(0, cut - 1)
        return cls(quantile(values, 0.5), ordered[first], ordered[count - 1 - first], count)


# Timing


def order_of(names: Sequence[str], turn: int) -> list[str]:
    """The order of a turn: rotated every second turn, reversed in between.

    Over 2n turns each of n actions stands twice in each place.
    """
    start = turn // 2 % len(names)
    rotated = [*names[start:], *names[:start]]
    return rotated[::-1] if turn % 2 else rotated


@contextmanager
def without_collection() -> Iterator[Callable[[], int]]:
    """Switches garbage collection off; yields a function that collects when asked."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield gc.collect
    finally:
        gc.enable()
        gc.unfreeze()


def interleave(
    actions: Mapping[str, Action],
    repeats: int,
    *,
    warmup: int = 3,
    device: torch.device | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each action, once in each of `repeats` turns, after `warmup` turns thrown away.

    Each action gets the turn's number. A CUDA `device` is synchronised around each action.
    """
    on_cuda = device is not None and device.type == "cuda"
    wait = torch.cuda.synchronize if on_cuda else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    with without_collection() as collect:
        for turn in range(warmup + repeats):
            collect()
            for name in order_of(list(actions), turn):
                wait()
                begin = clock()
                actions[name](turn)
                wait()
                if turn >= warmup:
                    seconds[name].append(clock() - begin)
    return seconds


# Lines of the table


@dataclass(frozen=True)
class Case:
    """One line of a benchmark's table: a ratio and the amounts that it divides."""

    name: str
    ratio: Spread
    amounts: Mapping[str, float]
    unit: str = "s"

    def line(self) -> str:
        """The line as text, the ratio first."""
        amounts = ", ".join(f"{name} {value:.4g}" for name, value in self.amounts.items())
        interval = f"[{self.ratio.low:.3f}, {self.ratio.high:.3f}]"
        return f"{self.ratio.median:7.3f}  {interval:<18} {self.name}  ({amounts} {self.unit})"


def paired_ratios(values: Mapping[str, Sequence[float]], pair: tuple[str, str]) -> list[float]:
    """The ratio of two actions in each turn: whatever slows a whole turn down drops out."""
    first, second = pair
    return [one / other for one, other in zip(values[first], values[second], strict=True)]


def ratio_case(
    name: str, values: Mapping[str, Sequence[float]], pair: tuple[str, str], unit: str = "s"
) -> Case:
    """The case of one action over another, from their values in each turn."""
    amounts = {action: quantile(values[action], 0.5) for action in pair}
    return Case(name, Spread.of(paired_ratios(values, pair)), amounts, unit)


def compare(
    actions: Mapping[str, Action],
    lines: Mapping[str, tuple[str, str]],
    options: Namespace,
    device: torch.device,
) -> list[Case]:
    """Times the actions in turns; a case for each line, which names the action above and below."""
    seconds = interleave(actions, options.repeats, warmup=options.warmup, device=device)
    return [ratio_case(name, seconds, pair) for name, pair in lines.items()]


# The command


def parser_of(description: str | None, repeats: int) -> ArgumentParser:
    """A parser with the options that all benchmarks have."""
    parser = ArgumentParser(description=description, formatter_class=ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--device", default="cpu", help="cpu, cuda, cuda:1, …")
    add("--threads", type=int, default=torch.get_num_threads(), help="of torch on the CPU")
    text = "keep freed memory, as bayestune's commands do, or use the C library's defaults"
    add("--allocator", choices=("kept", "stock"), default="kept", help=text)
    add("--repeats", type=int, default=repeats, help="turns that count")
    add("--warmup", type=int, default=3, help="turns before them, thrown away")
    add("--seed", type=int, default=0, help="of weights, tokens and the choice of rows")
    add("--json", type=Path, default=None, help="append the run to this file as one JSON line")
    return parser


def device_of(options: Namespace) -> torch.device:
    """The device to measure on, after allocator, threads and seed are set."""
    keep_freed_memory(options.allocator == "kept")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    return torch.device(options.device)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _revision() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def environment(device: torch.device) -> dict[str, Any]:
    """Machine, threads, load and versions, without which a figure means nothing."""
    where: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "revision": _revision(),
        "date": datetime.now(UTC).isoformat(" ", "minutes")[:16],
    }
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        where |= {"cuda": torch.version.cuda, "gpu_memory_gib": round(memory, 1)}
    return where


def named(value: Any) -> Any:
    """An option as records keep it: only the name of a file or folder of this machine."""
    is_path = isinstance(value, str | Path) and Path(value).is_absolute()
    return Path(value).name if is_path else value


def report(
    benchmark: str,
    title: str,
    cases: Sequence[Case],
    options: Namespace,
    where: Mapping[str, Any],
) -> None:
    """Prints the table and appends the JSON line.

    Args:
        benchmark: its name.
        title: what the ratios are of.
        cases: the lines.
        options: of the command.
        where: the environment before the measurement, so that its load is not the benchmark's own.
    """
    print(title)
    print(" · ".join(f"{name} {value}" for name, value in where.items() if value is not None))
    print(f"{'ratio':>7}  {'95 % of median':<18} case")
    for case in cases:
        print(case.line())
    if options.json is None:
        return
    settings = {name: named(value) for name, value in vars(options).items() if name != "json"}
    record = {"benchmark": benchmark, "title": title, "environment": where, "options": settings}
    record["cases"] = [asdict(case) for case in cases]
    with options.json.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, default=str, allow_nan=False) + "\n")


Measure = Callable[[Namespace, torch.device], tuple[str, list[Case]]]


def run(benchmark: str, options: Namespace, measure: Measure) -> None:
    """Measures on the device of the options and reports; `measure` returns a title and cases."""
    device = device_of(options)
    where = environment(device)
    title, cases = measure(options, device)
    report(benchmark, title, cases, options, where)
