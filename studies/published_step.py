"""Our task step over the published form's and over the authors' code's, on the same real prompts.

The published form is `published.py`; the authors' code needs `--official`, a checkout. One line has
our step with the attention that training picks; all else has the same attention on both sides.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bayestune.training.cpu_attention import trains_faster_eagerly
from harness import Action, Case, compare, parser_of, run
from studies.choices import under_eager_attention
from studies.official import OfficialStep, official_class
from studies.published import PublishedStep, answer_loss, publish
from subjects import OURS, Prompts, adapt, real_prompts, task_loss, training_step, twin
from task_step import add_task_options, title_of

AS_TRAINED, PUBLISHED, OFFICIAL = "as trained", "lora, published form", "official"


Steps = Callable[[str], dict[str, Action]]


def subjects_of(prompts: Prompts, options: Namespace) -> Steps:
    """Makes the models, over one set of base weights; returns what makes their steps."""
    official = None
    if options.official is not None:
        cls = official_class(options.official)
        base = twin(prompts.model)  # before adapters are put into the model
        official = OfficialStep(cls, base, prompts, options.rank, "fp32")
    theirs = adapt(twin(prompts.model), "lora", options.rank)
    layers = publish(theirs)
    ours = adapt(prompts.model, OURS, options.rank)
    longest = max(batch["input_ids"].shape[1] for batch in prompts.batches)

    def steps(precision: str) -> dict[str, Action]:
        step = training_step(ours, OURS, task_loss(prompts), precision)
        eagerly = trains_faster_eagerly(ours, longest, bf16=precision == "bf16")
        made: dict[str, Action] = {
            OURS: step,
            AS_TRAINED: under_eager_attention(eagerly, step),
            PUBLISHED: PublishedStep(theirs, layers, answer_loss(prompts), precision),
        }
        if official is not None:
            official.precision = precision
            made[OFFICIAL] = official
        return made

    return steps


def measure(options: Namespace, device: torch.device) -> tuple[str, list[Case]]:
    """The cases of every precision."""
    prompts = real_prompts(options, device, "train")
    steps_in = subjects_of(prompts, options)
    lines = {
        "published form, ours with the attention it trains with": (AS_TRAINED, PUBLISHED),
        "published form": (OURS, PUBLISHED),
        "the authors' code": (OURS, OFFICIAL),
    }
    cases = []
    for precision in options.precisions:
        steps = steps_in(precision)
        titled = {}
        for name, pair in lines.items():
            if pair[1] in steps:
                titled[f"BLoB task step / {name}, {precision}"] = pair
        cases += compare(steps, titled, options, device)
    return title_of(prompts, options), cases


def parser() -> ArgumentParser:
    """The command's options."""
    made = parser_of(__doc__, repeats=36)
    add_task_options(made)
    add = made.add_argument
    add("--official", type=Path, default=None, help="a checkout of the authors' code")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and reports."""
    run("published_step", parser().parse_args(arguments), measure)


if __name__ == "__main__":
    main()
