"""Text scoring: question and options packed in one sequence over a sequence for each option, on the same rows."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bayestune.scoring import make_scorer
from harness import Case, device_of, environment, interleave, parser_of, report, timed_case
from subjects import (
    PRECISIONS,
    Prompts,
    adapt,
    add_model_options,
    add_prompt_options,
    autocast,
    batches_of,
    real_task,
    task_loss,
    training_step,
)

NOISE = "row"
PACKED, EXPANDED = LAYOUTS = ("packed", "expanded")


def prompts_of(options: Namespace, device: torch.device) -> dict[str, Prompts]:
    """The same rows in both layouts, for one adapted model."""
    loaded, task = real_task(options, device)
    scorers = {
        name: make_scorer(loaded.model, loaded.tokenizer, task, "text", layout=name)
        for name in LAYOUTS
    }
    model = adapt(loaded.model, NOISE, options.rank)
    return {
        name: Prompts(model, scorer, batches_of(scorer, "train", options, device))
        for name, scorer in scorers.items()
    }


@dataclass(frozen=True)
class Prediction:
    """A pass of the mean without gradients."""

    prompts: Prompts
    device: torch.device
    precision: str

    def __call__(self, turn: int) -> Tensor:
        """Class logits of one turn's batch."""
        batch = self.prompts.batches[turn % len(self.prompts.batches)]
        with torch.inference_mode(), autocast(self.device, self.precision):
            return self.prompts.scorer(self.prompts.model, batch)


def difference(passes: Mapping[str, Prediction]) -> float:
    """How far the two layouts' class logits are apart at most, over all batches."""
    turns = range(len(passes[PACKED].prompts.batches))
    pairs = [(passes[PACKED](turn), passes[EXPANDED](turn)) for turn in turns]
    return max((one - other)[one.isfinite()].abs().max().item() for one, other in pairs)


def measure(
    prompts: Mapping[str, Prompts], options: Namespace, device: torch.device, precision: str
) -> tuple[list[Case], float]:
    """The cases of a precision, and how near the two layouts' logits are after the steps that were timed."""
    model = prompts[PACKED].model
    steps = {
        name: training_step(model.train(), NOISE, task_loss(one), precision)
        for name, one in prompts.items()
    }
    trained = interleave(steps, options.repeats, warmup=options.warmup, device=device)
    model.eval()
    passes = {name: Prediction(one, device, precision) for name, one in prompts.items()}
    predicted = interleave(passes, options.repeats, warmup=options.warmup, device=device)
    cases = [
        timed_case(f"BLoB training step, packed / expanded, {precision}", trained, LAYOUTS, None),
        timed_case(f"mean's pass, packed / expanded, {precision}", predicted, LAYOUTS, None),
    ]
    return cases, difference(passes)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and reports."""
    parser = parser_of(__doc__, repeats=24)
    add_model_options(parser, required=True)
    add_prompt_options(parser, rows=4)
    parser.add_argument(
        "--precisions",
        choices=PRECISIONS,
        nargs="+",
        default=list(PRECISIONS),
        help="each measured",
    )
    options = parser.parse_args(arguments)
    device = device_of(options)
    where, prompts = environment(device), prompts_of(options, device)
    cases, apart = [], []
    for precision in options.precisions:
        found, far = measure(prompts, options, device, precision)
        cases += found
        apart.append(f"{far:.2g} ({precision})")
    lengths = ", ".join(f"{one.mean_length:.0f} ({name})" for name, one in prompts.items())
    title = (
        f"Text scoring: {options.model}, {options.task}, {options.rows} questions, sequences of {lengths} tokens; the "
        f"two layouts' logits differ by at most {', '.join(apart)}"
    )
    report("text_step", title, cases, options, where)


if __name__ == "__main__":
    main()
