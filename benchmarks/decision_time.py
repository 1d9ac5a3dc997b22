"""Milliseconds a decision, alone and in batches: the mean, a student, ten draws, a cascade.

The student is a stock LoRA adapter, which is what distillation leaves; the mean is the posterior's
own. A cascade asks the student about every row and the draws only about those near the threshold;
`--near` says how many of a batch of eight are. All read the same prompts to the same answers.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

import torch
from torch import Tensor

from bayestune.forward import Draws
from bayestune.posteriors import Gaussian, Point
from draws import as_if_trained
from harness import Action, Case, compare, parser_of, run
from subjects import (
    OURS,
    STOCK,
    Batch,
    adapt_all,
    add_model_options,
    add_prompt_options,
    autocast,
    model_name,
    real_prompts,
)

MEAN, STUDENT, DRAWS, CASCADE = "mean", "student", "draws", "cascade"


def first_rows(batch: Batch, count: int) -> Batch:
    """The first rows of a batch."""
    return {name: value[:count] for name, value in batch.items()}


class Ways:
    """The ways to the decisions of a batch, all over one base model's weights."""

    def __init__(self, options: Namespace, device: torch.device) -> None:
        prompts = real_prompts(options, device, "evaluation")
        self.batches = prompts.batches
        self.length = prompts.mean_length
        models = adapt_all(prompts.model, [OURS, STOCK], options.rank)
        self.gaussian = Gaussian(as_if_trained(models[OURS]), prompts.scorer)
        self.student = Point(models[STOCK].eval(), prompts.scorer)
        self.draws = Draws(options.draws)
        self.device = device

    def actions(self, rows: int, near: int, precision: str) -> dict[str, Action]:
        """The ways for batches of some rows, of which so many are drawn in a cascade."""

        def answer(posterior: Gaussian | Point, draws: Draws, turn: int, count: int) -> Tensor:
            batch = first_rows(self.batches[turn % len(self.batches)], count)
            with autocast(self.device, precision):
                return posterior.logits(batch, draws)

        def cascade(turn: int) -> Tensor:
            found = answer(self.student, Draws(0), turn, rows)
            return answer(self.gaussian, self.draws, turn, near) if near else found

        return {
            MEAN: lambda turn: answer(self.gaussian, Draws(0), turn, rows),
            STUDENT: lambda turn: answer(self.student, Draws(0), turn, rows),
            DRAWS: lambda turn: answer(self.gaussian, self.draws, turn, rows),
            CASCADE: cascade,
        }


def in_milliseconds(case: Case, rows: int) -> Case:
    """A case with its amounts a decision."""
    amounts = {name: 1000 * value / rows for name, value in case.amounts.items()}
    return Case(case.name, case.ratio, amounts, "ms a decision")


def parser() -> ArgumentParser:
    """The command's options."""
    made = parser_of(__doc__, repeats=20)
    add_model_options(made, required=True)
    add_prompt_options(made, rows=8)
    made.add_argument("--draws", type=int, default=10, help="how many")
    made.add_argument("--near", type=int, default=2, help="rows of a full batch that are drawn")
    return made


def measure(options: Namespace, device: torch.device) -> tuple[str, list[Case]]:
    """The cases of every precision and size of a batch."""
    ways = Ways(options, device)
    cases = []
    for precision in options.precisions:
        for rows in (1, options.rows):
            near = options.near if rows > 1 else 0
            actions = ways.actions(rows, near, precision)
            for turn in range(len(ways.batches)):  # reads what the rows begin with
                for act in actions.values():
                    act(turn)
            count = f"{options.draws} draws"
            lines = {f"batch {rows}: student / mean, {precision}": (STUDENT, MEAN)}
            lines[f"batch {rows}: {count} / mean, {precision}"] = (DRAWS, MEAN)
            if near:
                said = f"batch {rows}: student, then {count} of {near} rows / mean"
                lines[f"{said}, {precision}"] = (CASCADE, MEAN)
            else:
                actions.pop(CASCADE)
            found = compare(actions, lines, options, device)
            cases += [in_milliseconds(case, rows) for case in found]
    size = f"{options.task}, prompts of {ways.length:.0f} tokens on average"
    return f"Milliseconds a decision: {model_name(options)}, {size}", cases


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and reports."""
    run("decision_time", parser().parse_args(arguments), measure)


if __name__ == "__main__":
    main()
