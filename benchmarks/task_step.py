"""Our task step (BLoB, last position's logits only) over a stock LoRA step with full logits, on the same prompts."""

import math
from argparse import Namespace
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness import Case, device_of, environment, interleave, parser_of, report, timed_case
from subjects import (
    PRECISIONS,
    STOCK,
    Loss,
    Prompts,
    adapt_all,
    add_model_options,
    add_prompt_options,
    real_prompts,
    training_step,
)

BAR = 0.75
OURS, STOCK_LAST = "row", "lora, last logits"


def task_loss(prompts: Prompts) -> Loss:
    """What `ClassTrainer` computes: cross-entropy over the options' tokens at the last position, checked for NaN."""

    def loss(model: nn.Module, turn: int) -> Tensor:
        batch = prompts.batches[turn % len(prompts.batches)]
        value = F.cross_entropy(prompts.scorer(model, batch), batch["labels"])
        if not math.isfinite(value.item()):
            raise FloatingPointError(f"the loss is {value.item()} at turn {turn}")
        return value

    return loss


def full_loss(prompts: Prompts) -> Loss:
    """What a stock causal trainer computes: logits at all positions in float32, only the answer's position counted."""
    tokens = torch.tensor(prompts.scorer.tokens)

    def loss(model: nn.Module, turn: int) -> Tensor:
        batch = prompts.batches[turn % len(prompts.batches)]
        targets = torch.full_like(batch["input_ids"], -100)
        targets[:, -1] = tokens.to(targets.device)[batch["labels"]]
        names = ("input_ids", "attention_mask", "position_ids")
        logits = model(**{name: batch[name] for name in names}, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    return loss


def measure(prompts: Prompts, options: Namespace, device: torch.device) -> list[Case]:
    """The cases of every precision."""
    models = adapt_all(prompts.model, [STOCK, STOCK_LAST, OURS], options.rank)
    losses = {STOCK: full_loss(prompts), STOCK_LAST: task_loss(prompts), OURS: task_loss(prompts)}
    cases = []
    for precision in options.precisions:
        steps = {name: training_step(model, name, losses[name], precision) for name, model in models.items()}
        seconds = interleave(steps, options.repeats, warmup=options.warmup, device=device)
        cases += [
            timed_case(f"BLoB task step / stock LoRA, full logits, {precision}", seconds, (OURS, STOCK), BAR),
            timed_case(f"BLoB task step / stock LoRA, last logits, {precision}", seconds, (OURS, STOCK_LAST), None),
        ]
    return cases


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and reports."""
    parser = parser_of(__doc__, repeats=36)
    add_model_options(parser, required=True)
    add_prompt_options(parser, rows=4)
    parser.add_argument("--precisions", choices=PRECISIONS, nargs="+", default=list(PRECISIONS), help="each a line")
    options = parser.parse_args(arguments)
    device = device_of(options)
    where, prompts = environment(device), real_prompts(options, device, "train")
    title = (
        f"Task step: {options.model}, {options.task}, {options.rows} prompts of {prompts.mean_length:.0f} tokens with "
        "padding on average"
    )
    report("task_step", title, measure(prompts, options, device), options, where)


if __name__ == "__main__":
    main()
