"""Our task step (BLoB, the last position's logits) over stock LoRA's, on the same real prompts.

Stock LoRA computes the logits of all positions and counts the answer's, as a stock causal trainer
does, or the last position's logits alone, as ours does.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness import Case, compare, parser_of, run
from subjects import (
    OURS,
    STOCK,
    Loss,
    Prompts,
    adapt_all,
    add_model_options,
    add_prompt_options,
    model_name,
    real_prompts,
    task_loss,
    training_step,
)

Encoded = dict[str, Any]
STOCK_LAST = "lora, last logits"
INPUTS = ("input_ids", "attention_mask", "position_ids")


def full_loss(prompts: Prompts) -> Loss:
    """A stock causal trainer's loss: float32 logits at all positions, the answer's counted."""
    tokens = torch.tensor(prompts.scorer.tokens)  # type: ignore[union-attr]

    def loss(model: nn.Module, turn: int) -> Tensor:
        batch = prompts.batch(turn)
        targets = torch.full_like(batch["input_ids"], -100)
        targets[:, -1] = tokens.to(targets.device)[batch["labels"]]
        logits = model(**{name: batch[name] for name in INPUTS}, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    return loss


def add_task_options(parser: ArgumentParser) -> None:
    """Options of the model and the prompts."""
    add_model_options(parser, required=True)
    add_prompt_options(parser, rows=4)


def title_of(prompts: Prompts, options: Namespace) -> str:
    """What the ratios are of."""
    size = f"{options.rows} prompts of {prompts.mean_length:.0f} tokens with padding on average"
    return f"Task step: {model_name(options)}, {options.task}, {size}"


def parser() -> ArgumentParser:
    """The command's options."""
    made = parser_of(__doc__, repeats=36)
    add_task_options(made)
    return made


def measure(options: Namespace, device: torch.device) -> tuple[str, list[Case]]:
    """The cases of every precision."""
    prompts = real_prompts(options, device, "train")
    losses = {STOCK: full_loss, STOCK_LAST: task_loss, OURS: task_loss}
    models = adapt_all(prompts.model, list(losses), options.rank)
    cases = []
    for precision in options.precisions:
        steps = {
            name: training_step(models[name], name, make(prompts), precision)
            for name, make in losses.items()
        }
        lines = {
            f"BLoB task step / stock LoRA, full logits, {precision}": (OURS, STOCK),
            f"BLoB task step / stock LoRA, last logits, {precision}": (OURS, STOCK_LAST),
        }
        cases += compare(steps, lines, options, device)
    return title_of(prompts, options), cases


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and reports."""
    run("task_step", parser().parse_args(arguments), measure)


if __name__ == "__main__":
    main()
