"""Our task step (BLoB, last logits) over the published form, the authors' code and stock LoRA, on the same prompts."""

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayestune.order import by_length
from harness import (
    Action,
    Case,
    Spread,
    device_of,
    environment,
    interleave,
    paired_ratios,
    parser_of,
    report,
    timed_case,
)
from official import OfficialStep, official_class, official_step
from published import answer_loss, publish, published_step
from subjects import (
    PRECISIONS,
    STOCK,
    Loss,
    Prompts,
    TrainingStep,
    adapt_all,
    add_model_options,
    add_prompt_options,
    on,
    real_prompts,
    task_loss,
    training_step,
    twin,
)

Encoded = Sequence[dict]
OURS, STOCK_LAST, PUBLISHED, OFFICIAL = "row", "lora, last logits", "lora, published form", "official"
# The lines: what our step is divided by, its name in the table and the bar.
LINES = {
    PUBLISHED: ("published form", 0.60),
    OFFICIAL: ("the authors' code", None),
    STOCK: ("stock LoRA, full logits", 0.75),
    STOCK_LAST: ("stock LoRA, last logits", None),
}
GROUPED, RANDOM = "by length", "random order"


def options_of(arguments: Sequence[str] | None) -> Namespace:
    """The command's options."""
    parser = parser_of(__doc__, repeats=36)
    add_model_options(parser, required=True)
    add_prompt_options(parser, rows=4)
    parser.add_argument("--precisions", choices=PRECISIONS, nargs="+", default=list(PRECISIONS), help="each measured")
    parser.add_argument("--official", type=Path, default=None, help="a checkout of the authors' code, measured too")
    parser.add_argument("--epoch_rows", type=int, default=96, help="rows of an epoch by length; 0 for no such lines")
    parser.add_argument("--epochs", type=int, default=6, help="epochs by length and in random order")
    return parser.parse_args(arguments)


def full_loss(prompts: Prompts) -> Loss:
    """What a stock causal trainer computes: logits at all positions in float32, only the answer's position counted."""
    tokens = torch.tensor(prompts.scorer.tokens)  # type: ignore[union-attr]

    def loss(model: nn.Module, turn: int) -> Tensor:
        batch = prompts.batches[turn % len(prompts.batches)]
        targets = torch.full_like(batch["input_ids"], -100)
        targets[:, -1] = tokens.to(targets.device)[batch["labels"]]
        names = ("input_ids", "attention_mask", "position_ids")
        logits = model(**{name: batch[name] for name in names}, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    return loss


def subjects_of(prompts: Prompts, options: Namespace) -> Callable[[str], dict[str, Action]]:
    """Makes the step of each subject in a precision; the models, over one set of base weights, are made once."""
    authors: OfficialStep | None = None
    base = twin(prompts.model)  # before adapters are put into the model
    models = adapt_all(prompts.model, [STOCK, STOCK_LAST, PUBLISHED, OURS], options.rank)
    noisy = publish(models[PUBLISHED])
    if options.official is not None:
        authors = official_step(official_class(options.official), base, prompts, options.rank, "fp32")
    losses = {STOCK: full_loss(prompts), STOCK_LAST: task_loss(prompts), OURS: task_loss(prompts)}

    def steps(precision: str) -> dict[str, Action]:
        made: dict[str, Action] = {
            name: training_step(models[name], name, loss, precision) for name, loss in losses.items()
        }
        made[PUBLISHED] = published_step(models[PUBLISHED], noisy, answer_loss(prompts), precision)
        return made if authors is None else {**made, OFFICIAL: replace(authors, precision=precision)}

    return steps


def shuffled(rows: int, seed: int, epoch: int) -> list[int]:
    """A random order of the rows, new for each epoch."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed((seed << 32) + epoch)).tolist()


def in_batches(order: Sequence[int], rows: Encoded, size: int) -> list[list[dict]]:
    """The rows in this order, cut into batches."""
    return [[rows[i] for i in order[start : start + size]] for start in range(0, len(order), size)]


def epoch_of(step: TrainingStep, prompts: Prompts, batches: Callable[[int], list[list[dict]]]) -> Action:
    """An action that takes the steps of a whole epoch, whose batches it collates as training does."""

    def act(turn: int) -> None:
        collated = [on(step.device, prompts.scorer.collate(rows)) for rows in batches(turn)]
        one = replace(step, loss=task_loss(replace(prompts, batches=collated)))
        for number in range(len(collated)):
            one(number)

    return act


def padded(batches: Sequence[Encoded]) -> float:
    """Tokens a row, padding included."""
    tokens = sum(len(rows) * max(row["length"] for row in rows) for rows in batches)
    return tokens / sum(map(len, batches))


def epoch_cases(step: TrainingStep, prompts: Prompts, options: Namespace, precision: str) -> list[Case]:
    """Batches by length over batches in random order, for whole epochs of the same rows: seconds and tokens a row."""
    rows = prompts.scorer.encode(prompts.scorer.task.train[: options.epoch_rows])
    lengths = [row["length"] for row in rows]
    orders: Mapping[str, Callable[[int], list[int]]] = {
        GROUPED: partial(by_length, lengths, options.rows, options.seed),
        RANDOM: partial(shuffled, len(rows), options.seed),
    }
    batches = {
        name: lambda epoch, order=order: in_batches(order(epoch), rows, options.rows) for name, order in orders.items()
    }
    actions = {name: epoch_of(step, prompts, given) for name, given in batches.items()}
    laps = interleave(actions, options.epochs, warmup=1, device=step.device)
    seconds = {name: [lap / len(rows) for lap in values] for name, values in laps.items()}
    tokens = {name: [padded(given(epoch)) for epoch in range(1, options.epochs + 1)] for name, given in batches.items()}
    title = f"batches {GROUPED} / in {RANDOM}, a row of an epoch of {len(rows)}"
    counts = {name: sum(values) / len(values) for name, values in tokens.items()}
    return [
        timed_case(f"BLoB, {title}, {precision}", seconds, (GROUPED, RANDOM), None),
        Case(
            f"tokens, {title}, {precision}", Spread.of(paired_ratios(tokens, GROUPED, RANDOM)), None, counts, "tokens"
        ),
    ]


def measure(prompts: Prompts, options: Namespace, device: torch.device) -> list[Case]:
    """The cases of every precision."""
    make, cases = subjects_of(prompts, options), []
    for precision in options.precisions:
        steps = make(precision)
        seconds = interleave(steps, options.repeats, warmup=options.warmup, device=device)
        cases += [
            timed_case(f"BLoB task step / {title}, {precision}", seconds, (OURS, base), bar)
            for base, (title, bar) in LINES.items()
            if base in steps
        ]
        if options.epoch_rows:
            cases += epoch_cases(steps[OURS], prompts, options, precision)  # type: ignore[arg-type]
    return cases


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and reports."""
    options = options_of(arguments)
    device = device_of(options)
    where, prompts = environment(device), real_prompts(options, device, "train")
    title = (
        f"Task step: {options.model}, {options.task}, {options.rows} prompts of {prompts.mean_length:.0f} tokens with "
        "padding on average"
    )
    report("task_step", title, measure(prompts, options, device), options, where)


if __name__ == "__main__":
    main()
