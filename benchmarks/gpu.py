"""Everything that a CUDA machine can tell, in one command of at most eight minutes.

Llama-2-7B and Llama-3.1-8B geometries with random bfloat16 weights: no files and no network. Training steps, memory,
kernel launches, held draws. Each section has a share of `--seconds`; its turns are as many as fit, `--repeats` at most;
what does not fit is left out with its reason. Each section's line is written to `--json` as soon as it is measured.
"""

import gc
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gpu_budget import Budget, Clock, Pace, UnfitError
from gpu_sections import SECTIONS
from gpu_subject import GEOMETRIES, Subject
from harness import device_of, environment, parser_of, report


def options_of(arguments: Sequence[str] | None) -> Namespace:
    """The command's options."""
    parser = parser_of(__doc__, repeats=400)
    parser.set_defaults(
        device="cuda", warmup=1
    )  # the turns that show how many fit have warmed up already
    parser.add_argument(
        "--geometry",
        choices=list(GEOMETRIES),
        nargs="+",
        default=["llama2-7b", "llama31-8b"],
        help="each measured",
    )
    parser.add_argument(
        "--sections", choices=list(SECTIONS), nargs="+", default=list(SECTIONS), help="each a line"
    )
    parser.add_argument("--seconds", type=float, default=480.0, help="of wall time, for all")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters")
    parser.add_argument(
        "--targets", nargs="+", default=["q_proj", "v_proj", "lm_head"], help="adapted modules"
    )
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument(
        "--control", action="store_true", help="a second stock LoRA too: how far from 1 chance goes"
    )
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(
            "no CUDA device: got --device cuda, expected a machine with one; give --device cpu to try it out"
        )
    return options


def surroundings(device: torch.device) -> dict[str, Any]:
    """The environment, with what CUDA adds."""
    where = environment(device)
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        where |= {"cuda": torch.version.cuda, "gpu_memory_gib": round(memory, 1)}
    return where


def measure(name: str, subject: Subject, pace: Pace, where: Mapping[str, Any]) -> None:
    """Measures a section and reports it as a run of its own, whose options name this geometry and section alone."""
    options, cases = subject.options, SECTIONS[name].run(subject, pace)
    own = Namespace(**{**vars(options), "geometry": [subject.geometry], "sections": [name]})
    adapters = f"rank {options.rank} on {', '.join(options.targets)}"
    report(
        "gpu", f"{subject.geometry} geometry, random bf16 weights, {adapters}", cases, own, where
    )
    sys.stdout.flush()


def release() -> None:
    """Gives the memory of what is not referred to any more back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run(options: Namespace, clock: Clock = time.perf_counter) -> list[str]:
    """Measures every section of every geometry within the time; gives those that failed, not those left out."""
    budget, device = Budget(options.seconds, clock), device_of(options)
    where, failed = surroundings(device), []
    plan = [SECTIONS[name].weight for _ in options.geometry for name in options.sections]
    for geometry in options.geometry:
        subject = Subject(geometry, options, device)
        for name in options.sections:
            weights, begin = plan[:], clock()
            plan.pop(0)
            try:
                pace = Pace(
                    budget.deadline(weights), options.repeats, options.warmup, device, clock
                )
                measure(name, subject, pace, where)
                print(f"{geometry} {name}: {clock() - begin:.1f} s\n")
            except UnfitError as reason:
                print(f"{geometry} {name} left out: {reason}\n")
            except (
                Exception
            ) as error:  # such as a lack of memory: the other sections can still be measured
                failed.append(f"{geometry} {name}")
                print(f"{geometry} {name} failed: {type(error).__name__}: {error}\n")
            release()
        del subject
        release()
    return failed


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and reports; exits with 1 if a section failed."""
    warnings.simplefilter(
        "ignore", FutureWarning
    )  # of names that the oldest transformers we support knows alone
    if failed := run(options_of(arguments)):
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
