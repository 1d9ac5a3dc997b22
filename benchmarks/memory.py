"""Peak memory of a BLoB training step over a stock PEFT LoRA step's.

Peak memory is what lies there between steps (weights, adapters, optimiser state: unique storages)
plus the most that the step has allocated at one time. On CUDA the latter is `max_memory_allocated`;
on the CPU it is exact too, the highest level of the profiler's record of every allocation and
release of torch's allocator. Not counted: the Python process, libraries, and buffers that a BLAS
allocates for itself. Bytes saved for the backward pass are the unique storages that autograd keeps,
parameters left out.
"""

import json
import os
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from harness import Case, parser_of, ratio_case, run
from subjects import STOCK, TrainingStep, autocast
from train_step import add_step_options, size_of, steps_by_precision

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # or the profiler announces every start and stop
MIB = 2**20


def unique_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages under the tensors, each counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def persistent_bytes(step: TrainingStep) -> int:
    """Bytes that lie there between steps."""
    slots = chain.from_iterable(state.values() for state in step.optimizer.state.values())
    state = filter(torch.is_tensor, slots)
    return unique_bytes(chain(step.model.parameters(), step.model.buffers(), state))


def allocations(trace: Path) -> list[int]:
    """Bytes allocated (positive) and released (negative) on the CPU, in order, from a trace."""
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    memory = [event for event in events if event.get("name") == "[memory]"]
    on_cpu = [event for event in memory if event["args"]["Device Type"] == 0]
    return [event["args"]["Bytes"] for event in sorted(on_cpu, key=lambda event: event["ts"])]


def step_peak(step: TrainingStep) -> int:
    """The most bytes that one step has allocated at a time, over what lay there before."""
    if step.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(step.device)
        before = torch.cuda.memory_allocated(step.device)
        step(0)
        return torch.cuda.max_memory_allocated(step.device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step(0)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        record.export_chrome_trace(str(trace))
        return max(accumulate(allocations(trace), initial=0))


def saved_bytes(step: TrainingStep) -> int:
    """Bytes that autograd keeps between the forward and the backward pass, parameters left out."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in step.model.parameters()}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, autocast(step.device, step.precision):
        loss = step.loss(step.model, 0)  # keeps the graph, and its storages, until all are counted
    total = unique_bytes(kept)
    del loss
    return total


def peaks_of(step: TrainingStep, warmup: int, repeats: int) -> dict[str, list[float]]:
    """MiB of each kind, a value a repeat; the first steps make the optimiser's state."""
    for _ in range(warmup):
        step(0)
    peaks = [step_peak(step) / MIB for _ in range(repeats)]
    resting = persistent_bytes(step) / MIB
    return {
        "peak memory": [resting + peak for peak in peaks],
        "allocated in the step": peaks,
        "saved for the backward pass": [saved_bytes(step) / MIB],
    }


def parser() -> ArgumentParser:
    """The command's options."""
    made = parser_of(__doc__, repeats=1)
    add_step_options(made)
    return made


def measure(options: Namespace, device: torch.device) -> tuple[str, list[Case]]:
    """The cases of every precision and noise."""
    cases = []
    for precision, steps in steps_by_precision([STOCK, *options.noise], options, device):
        found = {
            name: peaks_of(step, options.warmup, options.repeats) for name, step in steps.items()
        }
        for name in options.noise:
            for kind in found[name]:
                values = {each: found[each][kind] for each in (name, STOCK)}
                title = f"{kind}, {name}, {precision}"
                cases.append(ratio_case(title, values, (name, STOCK), "MiB"))
    return f"BLoB memory / stock LoRA memory: {size_of(options)}", cases


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and reports."""
    run("memory", parser().parse_args(arguments), measure)


if __name__ == "__main__":
    main()
