"""One adapter's A, forward and backward pass: ours over a stock Linear, over autograd's plain form, and compiled."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from bayestune.adapters import GaussianLinear
from bayestune.adapters.drawn_linear import compute_dtype
from bayestune.adapters.noise import row_weights
from harness import Action, device_of, environment, interleave, parser_of, report, timed_case
from subjects import PRECISIONS, autocast

LINEAR, OURS, PLAIN, COMPILED = "stock Linear", "ours", "autograd", "compiled"
CALLS = 20  # of one turn: a single one is too short to time


def plain(input: Tensor, mean: Tensor, root_std: Tensor) -> Tensor:
    """The same map by differentiable operations."""
    dtype = compute_dtype(mean)
    weights = row_weights(mean, root_std.square(), len(input))
    return torch.bmm(input.to(dtype), weights.to(dtype).transpose(1, 2))


def action(run: Callable[[Tensor], Tensor], input: Tensor, precision: str) -> Action:
    """Calls, each forward and backward."""

    def act(_: int) -> None:
        for _call in range(CALLS):
            with autocast(input.device, precision):
                output = run(input)
            output.float().sum().backward()
            input.grad = None

    return act


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and reports."""
    parser = parser_of(__doc__, repeats=30)
    parser.add_argument("--rows", type=int, default=4, help="of the batch")
    parser.add_argument("--length", type=int, default=96, help="tokens of a row")
    parser.add_argument("--hidden", type=int, default=896, help="k")
    parser.add_argument("--rank", type=int, default=8, help="r")
    parser.add_argument(
        "--compile", action="store_true", help="a line for torch.compile, too; needs a compiler"
    )
    parser.add_argument(
        "--precisions",
        choices=PRECISIONS,
        nargs="+",
        default=list(PRECISIONS),
        help="each measured",
    )
    options = parser.parse_args(arguments)
    device = device_of(options)
    where = environment(device)
    linear = nn.Linear(options.hidden, options.rank, bias=False, device=device)
    ours = GaussianLinear(
        nn.Linear(options.hidden, options.rank, bias=False, device=device)
    ).train()
    compiled = torch.compile(plain)
    input = torch.randn(
        options.rows, options.length, options.hidden, device=device, requires_grad=True
    )
    runs: dict[str, Callable[[Tensor], Tensor]] = {
        LINEAR: linear,
        OURS: ours,
        PLAIN: lambda x: plain(x, ours.weight, ours.root_std),
        **(
            {COMPILED: lambda x: compiled(x, ours.weight, ours.root_std)} if options.compile else {}
        ),
    }
    cases = []
    for precision in options.precisions:
        actions = {name: action(run, input, precision) for name, run in runs.items()}
        seconds = interleave(actions, options.repeats, warmup=options.warmup, device=device)
        pairs = [(OURS, LINEAR), (OURS, PLAIN), *([(COMPILED, PLAIN)] if options.compile else [])]
        cases += [
            timed_case(f"{one} / {other}, {precision}", seconds, (one, other), None)
            for one, other in pairs
        ]
    title = f"{CALLS} calls of A ({options.rank}, {options.hidden}) on {options.rows}×{options.length} tokens"
    report("layer", title, cases, options, where)


if __name__ == "__main__":
    main()
