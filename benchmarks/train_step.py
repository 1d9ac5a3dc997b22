"""A BLoB training step over a stock PEFT LoRA step: same base weights, tokens, logits and optimiser."""

from argparse import Namespace
from collections.abc import Sequence

import torch
from torch import nn

from harness import Case, device_of, environment, interleave, parser_of, report, timed_case
from subjects import (
    PRECISIONS,
    STOCK,
    adapt_all,
    add_model_options,
    base_model,
    random_tokens,
    token_loss,
    training_step,
)

BAR = 1.02
CONTROL = "lora again"
NOISES = ("row", "independent", "token")


def options_of(arguments: Sequence[str] | None) -> Namespace:
    """The command's options."""
    parser = parser_of(__doc__, repeats=40)
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
        "--noise", choices=NOISES, nargs="+", default=["row"], help="BLoB's, each a line"
    )
    parser.add_argument(
        "--precisions", choices=PRECISIONS, nargs="+", default=list(PRECISIONS), help="each a line"
    )
    parser.add_argument(
        "--control", action="store_true", help="a second stock LoRA too: how far from 1 chance goes"
    )
    return parser.parse_args(arguments)


def measure(base: nn.Module, options: Namespace, device: torch.device) -> list[Case]:
    """The cases of every precision and noise."""
    names = [STOCK, *options.noise, *([CONTROL] if options.control else [])]
    models = adapt_all(base, names, options.rank)
    vocabulary = base.config.vocab_size  # type: ignore[union-attr]
    loss = token_loss(
        random_tokens(vocabulary, options.rows, options.length, device), options.logits
    )
    cases = []
    for precision in options.precisions:
        steps = {
            name: training_step(model, name, loss, precision) for name, model in models.items()
        }
        seconds = interleave(steps, options.repeats, warmup=options.warmup, device=device)
        for name in names[1:]:
            bar = BAR if name == "row" else None
            cases.append(timed_case(f"{name}, {precision}", seconds, (name, STOCK), bar))
    return cases


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and reports."""
    options = options_of(arguments)
    device = device_of(options)
    where, cases = environment(device), measure(base_model(options, device), options, device)
    model = options.model or f"random Llama, {options.layers} layers of {options.hidden}"
    title = f"BLoB step / stock LoRA step: {model}, {options.rows}×{options.length} tokens, {options.logits} logits"
    report("train_step", title, cases, options, where)


if __name__ == "__main__":
    main()
