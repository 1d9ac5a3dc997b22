"""Our task step (BLoB, last logits) over the published form, the authors' code and stock LoRA, on the same prompts."""

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attention import under
from bayestune.training.cpu_attention import eager_attention, trains_faster_eagerly
from bayestune.training.length_groups import by_length
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
OURS, OWN, STOCK_LAST, PUBLISHED, OFFICIAL = (
    "row",
    "as trained",
    "lora, last logits",
    "lora, published form",
    "official",
)
# The lines: what is divided by what, its name in the table and the bar.
LINES = (
    (OWN, PUBLISHED, "published form, ours with the attention it trains with", 0.60),
    (OURS, PUBLISHED, "published form", 0.60),
    (OURS, OFFICIAL, "the authors' code", None),
    (OURS, STOCK, "stock LoRA, full logits", None),
    (OURS, STOCK_LAST, "stock LoRA, last logits", None),
)
GROUPED, RANDOM, THEIRS = "by length", "random order", "published form, random order"


def options_of(arguments: Sequence[str] | None) -> Namespace:
    """The command's options."""
    parser = parser_of(__doc__, repeats=36)
    add_model_options(parser, required=True)
    add_prompt_options(parser, rows=4)
    parser.add_argument(
        "--precisions",
        choices=PRECISIONS,
        nargs="+",
        default=list(PRECISIONS),
        help="each measured",
    )
    parser.add_argument(
        "--official", type=Path, default=None, help="a checkout of the authors' code, measured too"
    )
    parser.add_argument(
        "--epoch_rows", type=int, default=96, help="rows of an epoch by length; 0 for no such lines"
    )
    parser.add_argument(
        "--epochs", type=int, default=6, help="epochs by length and in random order"
    )
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
        authors = official_step(
            official_class(options.official), base, prompts, options.rank, "fp32"
        )
    losses = {STOCK: full_loss(prompts), STOCK_LAST: task_loss(prompts), OURS: task_loss(prompts)}

    def steps(precision: str) -> dict[str, Action]:
        made: dict[str, Action] = {
            name: training_step(models[name], name, loss, precision)
            for name, loss in losses.items()
        }
        longest = max(batch["input_ids"].shape[1] for batch in prompts.batches)
        eagerly = trains_faster_eagerly(models[OURS], longest, bf16=precision == "bf16")
        made[OWN] = under(models[OURS], eagerly, made[OURS])
        made[PUBLISHED] = published_step(models[PUBLISHED], noisy, answer_loss(prompts), precision)
        return (
            made if authors is None else {**made, OFFICIAL: replace(authors, precision=precision)}
        )

    return steps


def shuffled(rows: int, seed: int, epoch: int) -> list[int]:
    """A random order of the rows, new for each epoch."""
    return torch.randperm(
        rows, generator=torch.Generator().manual_seed((seed << 32) + epoch)
    ).tolist()


def in_batches(order: Sequence[int], rows: Encoded, size: int) -> list[list[dict]]:
    """The rows in this order, cut into batches."""
    return [[rows[i] for i in order[start : start + size]] for start in range(0, len(order), size)]


@dataclass(frozen=True)
class Epoch:
    """An action: the steps of a whole epoch, whose batches it collates as training does."""

    step: Any
    loss: Callable[[Prompts], Loss]
    prompts: Prompts
    batches: Callable[[int], list[list[dict]]]
    eagerly: bool = False

    def __call__(self, turn: int) -> None:
        """Takes the steps of one turn's epoch."""
        collated = [
            on(self.step.device, self.prompts.scorer.collate(rows)) for rows in self.batches(turn)
        ]
        one = replace(self.step, loss=self.loss(replace(self.prompts, batches=collated)))
        with eager_attention(one.model, self.eagerly):
            for number in range(len(collated)):
                one(number)


def padded(batches: Sequence[Encoded]) -> float:
    """Tokens a row, padding included."""
    tokens = sum(len(rows) * max(row["length"] for row in rows) for rows in batches)
    return tokens / sum(map(len, batches))


def epoch_cases(
    steps: Mapping[str, Any], prompts: Prompts, options: Namespace, precision: str
) -> list[Case]:
    """Whole epochs of the same rows: batches by length over random order, in seconds and tokens a row; and all that
    training has to offer (batches by length, the attention it trains with) over the published form in random order."""
    rows = prompts.scorer.encode(prompts.scorer.task.train[: options.epoch_rows])
    lengths = [row["length"] for row in rows]
    eagerly = trains_faster_eagerly(steps[OURS].model, max(lengths), bf16=precision == "bf16")
    orders: Mapping[str, Callable[[int], list[int]]] = {
        GROUPED: partial(by_length, lengths, options.rows, options.seed),
        RANDOM: partial(shuffled, len(rows), options.seed),
    }
    batches = {
        name: lambda epoch, order=order: in_batches(order(epoch), rows, options.rows)
        for name, order in orders.items()
    }
    actions: dict[str, Action] = {
        GROUPED: Epoch(steps[OURS], task_loss, prompts, batches[GROUPED], eagerly),
        RANDOM: Epoch(steps[OURS], task_loss, prompts, batches[RANDOM], eagerly),
        THEIRS: Epoch(steps[PUBLISHED], answer_loss, prompts, batches[RANDOM]),
    }
    laps = interleave(actions, options.epochs, warmup=1, device=steps[OURS].device)
    seconds = {name: [lap / len(rows) for lap in values] for name, values in laps.items()}
    tokens = {
        name: [padded(given(epoch)) for epoch in range(1, options.epochs + 1)]
        for name, given in batches.items()
    }
    title, counts = (
        f"a row of an epoch of {len(rows)}, {precision}",
        {n: sum(v) / len(v) for n, v in tokens.items()},
    )
    return [
        timed_case(
            f"BLoB, batches {GROUPED} / {THEIRS}, {title}", seconds, (GROUPED, THEIRS), 0.60
        ),
        timed_case(
            f"BLoB, batches {GROUPED} / in {RANDOM}, {title}", seconds, (GROUPED, RANDOM), None
        ),
        Case(
            f"tokens, batches {GROUPED} / in {RANDOM}, {title}",
            Spread.of(paired_ratios(tokens, GROUPED, RANDOM)),
            None,
            counts,
            "tokens",
        ),
    ]


def measure(prompts: Prompts, options: Namespace, device: torch.device) -> list[Case]:
    """The cases of every precision."""
    make, cases = subjects_of(prompts, options), []
    for precision in options.precisions:
        steps = make(precision)
        seconds = interleave(steps, options.repeats, warmup=options.warmup, device=device)
        cases += [
            timed_case(f"BLoB task step / {title}, {precision}", seconds, (own, base), bar)
            for own, base, title, bar in LINES
            if base in steps
        ]
        if options.epoch_rows:
            cases += epoch_cases(steps, prompts, options, precision)
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
