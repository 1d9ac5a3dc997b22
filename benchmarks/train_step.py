"""A BLoB training step over a stock PEFT LoRA step: same weights, tokens, logits, optimiser."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence

import torch

from harness import Case, compare, parser_of, run
from subjects import (
    OURS,
    STOCK,
    TrainingStep,
    adapt_all,
    add_model_options,
    base_model,
    model_name,
    random_tokens,
    token_loss,
    training_step,
)

CONTROL = "lora again"
NOISES = ("row", "independent", "token")


def add_step_options(parser: ArgumentParser) -> None:
    """Options of the model, the batch and the noise."""
    add_model_options(parser)
    add = parser.add_argument
    add("--rows", type=int, default=4, help="of the batch")
    add("--length", type=int, default=128, help="tokens of a row")
    text = "which are computed, in both steps"
    add("--logits", choices=("last", "full"), default="last", help=text)
    add("--lora_dropout", type=float, default=0.0, help="LoRA dropout, in both steps")
    add("--noise", choices=NOISES, nargs="+", default=[OURS], help="BLoB's, each a line")


def steps_by_precision(
    names: Sequence[str], options: Namespace, device: torch.device
) -> Iterator[tuple[str, dict[str, TrainingStep]]]:
    """For each precision, the step of each named adapter, all on the same tokens."""
    base = base_model(options, device)
    models = adapt_all(base, names, options.rank, options.lora_dropout)
    vocabulary = base.config.vocab_size  # type: ignore[union-attr]
    ids = random_tokens(vocabulary, options.rows, options.length, device)
    loss = token_loss(ids, options.logits)
    for precision in options.precisions:
        yield (
            precision,
            {name: training_step(model, name, loss, precision) for name, model in models.items()},
        )


def size_of(options: Namespace) -> str:
    """The model and the batch in titles."""
    batch = f"{options.rows}×{options.length} tokens"
    size = f"{model_name(options)}, {batch}, {options.logits} logits"
    if options.dtype != "float32":
        size += f", {options.dtype} weights"
    if options.lora_dropout:
        size += f", LoRA dropout {options.lora_dropout:g}"
    return size


def parser() -> ArgumentParser:
    """The command's options."""
    made = parser_of(__doc__, repeats=40)
    add_step_options(made)
    text = "measure a second stock LoRA too, to see how far from 1 chance goes"
    made.add_argument("--control", action="store_true", help=text)
    return made


def measure(options: Namespace, device: torch.device) -> tuple[str, list[Case]]:
    """The cases of every precision and noise."""
    names = [STOCK, *options.noise, *([CONTROL] if options.control else [])]
    cases = []
    for precision, steps in steps_by_precision(names, options, device):
        lines = {f"{name}, {precision}": (name, STOCK) for name in names[1:]}
        cases += compare(steps, lines, options, device)
    return f"BLoB step / stock LoRA step: {size_of(options)}", cases


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and reports."""
    run("train_step", parser().parse_args(arguments), measure)


if __name__ == "__main__":
    main()
