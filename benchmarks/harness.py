"""What every benchmark shares: interleaved timing, paired ratios, the environment, a table and a JSON line."""

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


def quantile(values: Sequence[float], part: float) -> float:
    """The quantile of `values` by linear interpolation, `part` in [0, 1]."""
    ordered, place = sorted(values), part * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles and an interval that holds the true median with probability 0.95 or more.

    The interval is the sign test's, from order statistics: nothing is assumed about the distribution. With fewer
    than six values no two of them make such an interval, and it is the whole range.
    """

    median: float
    lower_quartile: float
    upper_quartile: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of at least one value."""
        ordered, count = sorted(values), len(values)
        tail, cut = 0.0, 0
        while cut < count // 2 and (tail := tail + math.comb(count, cut) / 2**count) <= 0.025:
            cut += 1
        first = max(0, cut - 1)
        quartiles = (quantile(values, part) for part in (0.5, 0.25, 0.75))
        return cls(*quartiles, ordered[first], ordered[count - 1 - first], count)


def paired_ratios(seconds: Mapping[str, Sequence[float]], name: str, base: str) -> list[float]:
    """The ratio of two actions in each turn: what slows a whole turn down drops out."""
    return [one / other for one, other in zip(seconds[name], seconds[base], strict=True)]


def order_of(names: Sequence[str], turn: int) -> list[str]:
    """The order of a turn: rotated every second turn, reversed every other, so that no action keeps its place."""
    start = turn // 2 % len(names)
    rotated = [*names[start:], *names[:start]]
    return rotated[::-1] if turn % 2 else rotated


@contextmanager
def without_collection() -> Iterator[Callable[[], int]]:
    """Switches garbage collection off; what is yielded collects on demand, quickly."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield gc.collect
    finally:
        gc.enable()
        gc.unfreeze()


def timed(action: Action, turn: int, wait: Callable[[], None], clock: Callable[[], float]) -> float:
    """Seconds of an action, the device's work before it and behind it waited for."""
    wait()
    begin = clock()
    action(turn)
    wait()
    return clock() - begin


def interleave(
    actions: Mapping[str, Action],
    repeats: int,
    *,
    warmup: int = 3,
    device: torch.device | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each action, once in each of `repeats` turns, after `warmup` turns that are thrown away.

    The actions are given the turn's number. A CUDA `device` is waited for before and after each action.
    """
    wait = torch.cuda.synchronize if device is not None and device.type == "cuda" else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    with without_collection() as collect:
        for turn in range(warmup + repeats):
            collect()
            for name in order_of(list(actions), turn):
                lap = timed(actions[name], turn, wait, clock)
                if turn >= warmup:
                    seconds[name].append(lap)
    return seconds


@dataclass(frozen=True)
class Case:
    """One line of a benchmark's table: a ratio, what it is of, and the bar it is held to (None for no bar)."""

    name: str
    ratio: Spread
    bar: float | None
    amounts: Mapping[str, float]
    unit: str = "s"

    def line(self) -> str:
        """The line as text, the ratio first."""
        bar = "" if self.bar is None else f"{self.bar:.2f}"
        amounts = ", ".join(f"{name} {value:.4g}" for name, value in self.amounts.items())
        quartiles = f"[{self.ratio.lower_quartile:.3f}, {self.ratio.upper_quartile:.3f}]"
        interval = f"[{self.ratio.low:.3f}, {self.ratio.high:.3f}]"
        return f"{self.ratio.median:7.3f}  {quartiles:<18} {interval:<18} {bar:>5}  {self.name}  ({amounts} {self.unit})"


def timed_case(
    name: str, seconds: Mapping[str, Sequence[float]], ratio_of: tuple[str, str], bar: float | None
) -> Case:
    """The case of one action over another, from the seconds of `interleave`."""
    amounts = {action: quantile(seconds[action], 0.5) for action in ratio_of}
    return Case(name, Spread.of(paired_ratios(seconds, *ratio_of)), bar, amounts)


def parser_of(description: str | None, repeats: int) -> ArgumentParser:
    """A parser with the options that all benchmarks have."""
    parser = ArgumentParser(description=description, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, …")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of torch on the CPU"
    )
    text = "whether the C library keeps freed memory, as in bayestune's commands, or has its own defaults"
    parser.add_argument("--allocator", choices=("kept", "stock"), default="kept", help=text)
    parser.add_argument("--repeats", type=int, default=repeats, help="turns that count")
    parser.add_argument("--warmup", type=int, default=3, help="turns before them, thrown away")
    parser.add_argument(
        "--seed", type=int, default=0, help="of weights, tokens and the choice of rows"
    )
    parser.add_argument(
        "--json", type=Path, default=None, help="file to append the run to, as one JSON line"
    )
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
    """Machine, threads, load and versions: what a figure cannot be read without."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "revision": _revision(),
        "date": datetime.now(UTC).isoformat(" ", "minutes")[:16],
    }


def named(value: object) -> object:
    """An option as it is kept: of a folder or file of this machine its name only."""
    is_path = isinstance(value, str | Path) and Path(value).is_absolute()
    return Path(value).name if is_path else value  # type: ignore[arg-type]


def report(
    benchmark: str, title: str, cases: Sequence[Case], options: Namespace, where: Mapping[str, Any]
) -> None:
    """Prints the table and appends the JSON line.

    Args:
        benchmark: its name.
        title: what the ratios are of.
        cases: the lines.
        options: of the command.
        where: the environment, taken before the measurement (its load is then not the benchmark's own).
    """
    print(title)
    print(" · ".join(f"{name} {value}" for name, value in where.items() if value is not None))
    print(f"{'ratio':>7}  {'quartiles':<18} {'95 % of median':<18} {'bar':>5}  case")
    for case in cases:
        print(case.line())
    if options.json is not None:
        settings = {name: named(value) for name, value in vars(options).items() if name != "json"}
        for value in vars(options).values():
            title = (
                title.replace(str(value), str(named(value))) if named(value) is not value else title
            )
        record = {"benchmark": benchmark, "title": title, "environment": where, "options": settings}
        record["cases"] = [asdict(case) for case in cases]
        with options.json.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, default=str, allow_nan=False) + "\n")
