"""Peak memory of a BLoB training step over a stock PEFT LoRA step's: same base weights, tokens, logits and optimiser.

Peak memory is what lies there between steps (weights, adapters, optimiser state: unique storages) plus the most that
the step has allocated at one time. On CUDA the latter is `max_memory_allocated`; on the CPU it is exact too, the
highest level of the profiler's record of every allocation and release of torch's allocator. Not counted: the Python
process, libraries, and buffers that a BLAS allocates for itself. Bytes saved for the backward pass are the unique
storages that autograd keeps, parameters left out.
"""

import json
import os
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from harness import Case, Spread, device_of, environment, parser_of, report
from subjects import (
    PRECISIONS,
    STOCK,
    TrainingStep,
    adapt_all,
    add_model_options,
    autocast,
    base_model,
    random_tokens,
    token_loss,
    training_step,
)

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # or the profiler announces every start and stop
BAR = 1.01
MIB = 2**20


def unique_bytes(tensors: Iterator[Tensor]) -> int:
    """Bytes of the storages under the tensors, each counted once."""
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


def persistent_bytes(step: TrainingStep) -> int:
    """Bytes that lie there between steps."""
    state = (
        value
        for slots in step.optimizer.state.values()
        for value in slots.values()
        if torch.is_tensor(value)
    )
    return unique_bytes(chain(step.model.parameters(), step.model.buffers(), state))


def allocations(trace: Path) -> list[int]:
    """Bytes allocated (positive) and released (negative) on the CPU, in order, from a profiler's trace."""
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    found = [
        event
        for event in events
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0
    ]
    return [event["args"]["Bytes"] for event in sorted(found, key=lambda event: event["ts"])]


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

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        autocast(step.device, step.precision),
    ):
        loss = step.loss(
            step.model, 0
        )  # keeps the graph, and so every kept storage, to the end of the count
    total = unique_bytes(iter(kept))
    del loss
    return total


def cases_of(
    name: str, precision: str, step: TrainingStep, stock: TrainingStep, options: Namespace
) -> list[Case]:
    """Peak of all memory, of the step's own, and bytes saved for the backward pass."""
    for _ in range(options.warmup):
        step(0)
        stock(0)
    resting = [persistent_bytes(step), persistent_bytes(stock)]
    peaks = [(step_peak(step), step_peak(stock)) for _ in range(options.repeats)]
    kinds = {
        "peak memory": [(resting[0] + ours, resting[1] + theirs) for ours, theirs in peaks],
        "allocated in the step": peaks,
        "saved for the backward pass": [(saved_bytes(step), saved_bytes(stock))],
    }
    return [
        Case(
            f"{kind}, {name}, {precision}",
            Spread.of([ours / theirs for ours, theirs in values]),
            BAR if kind == "peak memory" and name == "row" else None,
            {name: values[0][0] / MIB, STOCK: values[0][1] / MIB},
            "MiB",
        )
        for kind, values in kinds.items()
    ]


def options_of(arguments: Sequence[str] | None) -> Namespace:
    """The command's options."""
    parser = parser_of(__doc__, repeats=3)
    add_model_options(parser)
    parser.add_argument("--rows", type=int, default=4, help="of the batch")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument(
        "--logits",
        choices=("last", "full"),
        default="last",
        help="which are computed, in both steps",
    )
    parser.add_argument(
        "--noise",
        choices=("row", "independent", "token"),
        nargs="+",
        default=["row"],
        help="BLoB's",
    )
    parser.add_argument(
        "--precisions",
        choices=PRECISIONS,
        nargs="+",
        default=list(PRECISIONS),
        help="each measured",
    )
    return parser.parse_args(arguments)


def measure(base: nn.Module, options: Namespace, device: torch.device) -> list[Case]:
    """The cases of every precision and noise."""
    models = adapt_all(base, [STOCK, *options.noise], options.rank)
    vocabulary = base.config.vocab_size  # type: ignore[union-attr]
    loss = token_loss(
        random_tokens(vocabulary, options.rows, options.length, device), options.logits
    )
    cases = []
    for precision in options.precisions:
        steps = {
            name: training_step(model, name, loss, precision) for name, model in models.items()
        }
        for name in options.noise:
            cases += cases_of(name, precision, steps[name], steps[STOCK], options)
    return cases


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and reports."""
    options = options_of(arguments)
    device = device_of(options)
    where, cases = environment(device), measure(base_model(options, device), options, device)
    model = options.model or f"random Llama, {options.layers} layers of {options.hidden}"
    title = f"BLoB memory / stock LoRA memory: {model}, {options.rows}×{options.length} tokens, {options.logits} logits"
    report("memory", title, cases, options, where)


if __name__ == "__main__":
    main()
