"""A training step with eager attention over one with torch's fused function, by the length of the rows."""

from argparse import Namespace
from collections.abc import Sequence

import torch
from torch import nn

from bayestune.training.cpu_attention import eager_attention
from harness import Action, Case, device_of, environment, interleave, parser_of, report, timed_case
from subjects import (
    PRECISIONS,
    Loss,
    TrainingStep,
    adapt,
    add_model_options,
    base_model,
    random_tokens,
    token_loss,
    training_step,
)

EAGER, FUSED = "eager", "sdpa"


def under(model: nn.Module, active: bool, step: TrainingStep) -> Action:
    """The step with or without eager attention; the switch takes a millisecond."""

    def act(turn: int) -> None:
        with eager_attention(model, active):
            step(turn)

    return act


def cases_of(
    model: nn.Module, loss: Loss, length: int, options: Namespace, device: torch.device
) -> list[Case]:
    """A line for each precision."""
    cases = []
    for precision in options.precisions:
        step = training_step(model, "row", loss, precision)
        actions = {EAGER: under(model, True, step), FUSED: under(model, False, step)}
        seconds = interleave(actions, options.repeats, warmup=options.warmup, device=device)
        cases.append(
            timed_case(
                f"{options.rows}×{length} tokens, {precision}", seconds, (EAGER, FUSED), None
            )
        )
    return cases


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and reports."""
    parser = parser_of(__doc__, repeats=8)
    add_model_options(parser)
    parser.add_argument("--rows", type=int, default=4, help="of the batch")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[64, 128, 192, 300], help="tokens of a row"
    )
    parser.add_argument(
        "--precisions", choices=PRECISIONS, nargs="+", default=list(PRECISIONS), help="each a line"
    )
    options = parser.parse_args(arguments)
    device = device_of(options)
    where, base = environment(device), base_model(options, device)
    vocabulary = base.config.vocab_size  # type: ignore[union-attr]
    model, cases = adapt(base, "row", options.rank), []
    for length in options.lengths:
        loss = token_loss(random_tokens(vocabulary, options.rows, length, device), "last")
        cases += cases_of(model, loss, length, options, device)
    name = options.model or f"random Llama, {options.layers} layers of {options.hidden}"
    report("attention", f"BLoB step, eager / fused attention: {name}", cases, options, where)


if __name__ == "__main__":
    main()
