"""Adaptive draws: how many draws each rule of stopping uses, and what that costs in NLL, ECE and decisions.

The draws of a saved posterior (`--posterior`, `--model`, a task) are taken once, or read from a file (`--logits_file`)
that an earlier run kept (`--save_logits`); every setting is then replayed on them, in seconds. Draws are exchangeable,
so each setting is replayed under `--orders` random orders of them: amounts are means over the orders, the spread is
over the orders, not over rows or posteriors. The ratio is draws used over all S. Fixed numbers of draws stand beside:
"fixed" of a rule is the number of them with the same NLL, so that "draws" below "fixed" is a saving. "changed" is the
share of rows whose decision is not that of all S draws. With `--timed`, seconds of the rules on the model over those of
all draws, too.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bayestune.data import load_task
from bayestune.evaluation import Adaptive, predict_adaptively
from bayestune.evaluation.adaptive import AdaptivePrediction, in_rounds
from bayestune.forward import Draws
from bayestune.metrics import accuracy, ece, nll
from bayestune.posteriors import Posterior, load_posterior
from bayestune.scoring import Scorer, row_logits
from bayestune.session import open_folder, scorer_of
from harness import Case, Spread, device_of, environment, interleave, parser_of, report, timed_case

Amounts = dict[str, float]


@dataclass(frozen=True)
class Opened:
    """A saved posterior and the rows of a task it is asked, all with an answer."""

    posterior: Posterior
    scorer: Scorer

    @classmethod
    def of(cls, options: Namespace, device: torch.device) -> "Opened":
        """What the options name."""
        details, loaded = open_folder(options.posterior, options.model)
        loaded.model.to(device)
        task = load_task(options.task, options.data_root).subset(
            evaluation=options.rows, seed=options.seed
        )
        scorer = scorer_of(details, loaded, task)
        return cls(load_posterior(loaded.model, options.posterior, scorer), scorer)

    def draws(self, options: Namespace) -> dict[str, Tensor]:
        """Logits (S, N, C) of all draws, and labels (N,)."""
        questions, which = (
            self.scorer.task.evaluation,
            Draws(options.draws, shared_prefix=options.shared_prefix),
        )
        rows = self.scorer.encode(questions)
        logits = row_logits(
            self.posterior,
            self.scorer,
            rows,
            which,
            batch_size=options.batch_size,
            bf16=options.bf16,
            progress="draw",
        )
        return {
            "logits": logits.contiguous(),
            "labels": torch.tensor([row.answer for row in questions]),
        }

    def action(self, rule: Adaptive, options: Namespace) -> Callable[[int], object]:
        """Predicts all rows under a rule."""
        how = {name: getattr(options, name) for name in ("batch_size", "bf16", "shared_prefix")}
        questions = self.scorer.task.evaluation
        return lambda _: predict_adaptively(self.posterior, self.scorer, questions, rule, **how)


def rules_of(options: Namespace, most: int) -> dict[str, Adaptive]:
    """The rules to try, by name."""
    sizes = {"most": most, "least": options.least, "round_size": options.round_size}
    found = {"decided": Adaptive(**sizes, decided=True)}
    for error in options.standard_errors:
        found[f"standard error {error:g}"] = Adaptive(**sizes, standard_error=error)
    for error in options.standard_errors:
        found[f"standard error {error:g} or decided"] = Adaptive(
            **sizes, standard_error=error, decided=True
        )
    return found


def amounts_of(
    prediction: AdaptivePrediction, labels: Tensor, whole: AdaptivePrediction
) -> Amounts:
    """Draws a row, metrics, and the share of decisions that are not those of all draws."""
    probabilities = prediction.probabilities
    return {
        "draws": prediction.draws_used.double().mean().item(),
        "nll": nll(probabilities, labels),
        "ece": ece(probabilities, labels),
        "accuracy": accuracy(probabilities, labels),
        "changed": (prediction.choice != whole.choice).double().mean().item(),
    }


def replay(logits: Tensor, labels: Tensor, rules: Mapping[str, Adaptive]) -> dict[str, Amounts]:
    """The amounts of each fixed number of draws, by that number, and of each rule, for one order of the draws."""
    whole = AdaptivePrediction.of(logits)

    def saved(rows: list[int], draws: range) -> Tensor:
        return logits[draws.start : draws.stop, rows]

    found = {
        f"{count} draws": AdaptivePrediction.of(logits[:count])
        for count in range(1, len(logits) + 1)
    }
    found |= {name: in_rounds(saved, len(labels), rule) for name, rule in rules.items()}
    return {name: amounts_of(prediction, labels, whole) for name, prediction in found.items()}


def mean_of(runs: Sequence[Mapping[str, float]]) -> Amounts:
    """Each amount's mean over the orders."""
    return {name: sum(run[name] for run in runs) / len(runs) for name in runs[0]}


def same_nll(curve: Sequence[float], value: float) -> float:
    """The number of fixed draws, between whole ones by straight lines, at which their NLL has come down to `value`.

    Args:
        curve: NLL of 1, 2, …, S draws.
        value: an NLL; S where it is below the whole curve, 1 where it is above its start.

    Example:
        >>> same_nll([1.0, 0.6, 0.5], 0.7), same_nll([1.0, 0.6, 0.5], 0.4)
        (1.75, 3.0)
    """
    if value >= curve[0]:
        return 1.0
    for count, (before, after) in enumerate(pairwise(curve), start=1):
        if after <= value:
            return count + (before - value) / (before - after)
    return float(len(curve))


def replayed(
    logits: Tensor, labels: Tensor, rules: Mapping[str, Adaptive], options: Namespace
) -> list[Case]:
    """A case for some fixed numbers of draws and for each rule."""
    generator, most = torch.Generator().manual_seed(options.seed), len(logits)
    orders = [torch.randperm(most, generator=generator) for _ in range(options.orders)]
    runs = [replay(logits[order], labels, rules) for order in orders]
    means = {name: mean_of([run[name] for run in runs]) for name in runs[0]}
    curve = [means[f"{count} draws"]["nll"] for count in range(1, most + 1)]
    shown = [f"{count} draws" for count in sorted({*options.fixed, most}) if count <= most]
    fixed = {name: {"fixed": same_nll(curve, means[name]["nll"])} for name in rules}
    return [
        Case(
            name,
            Spread.of([run[name]["draws"] / most for run in runs]),
            None,
            means[name] | fixed.get(name, {}),
            "draws a row, nats, shares",
        )
        for name in [*shown, *rules]
    ]


def timed(
    opened: Opened, rules: Mapping[str, Adaptive], options: Namespace, device: torch.device
) -> list[Case]:
    """Seconds of each rule on the model over those of all draws in one round."""
    plain = f"{options.draws} draws"
    every = {plain: Adaptive(most=options.draws, least=max(2, options.draws)), **rules}
    actions = {name: opened.action(rule, options) for name, rule in every.items()}
    seconds = interleave(actions, options.repeats, warmup=options.warmup, device=device)
    return [timed_case(f"seconds, {name}", seconds, (name, plain), None) for name in rules]


def parser() -> ArgumentParser:
    """The command's options."""
    made = parser_of(__doc__, repeats=3)
    made.add_argument("--posterior", type=Path, default=None, help="a folder of `bayestune fit`")
    made.add_argument("--model", default=None, help="its base model, where it has moved")
    made.add_argument("--task", default="arc_easy", help="whose evaluation rows")
    made.add_argument(
        "--data_root", type=Path, default=None, help="folder of the data sets; left out: the Hub"
    )
    made.add_argument("--rows", type=int, default=300, help="of the task, seeded")
    made.add_argument("--batch_size", type=int, default=8, help="rows of a batch")
    made.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    made.add_argument(
        "--shared_prefix", type=int, default=None, help="draw only the last tokens of a prompt"
    )
    made.add_argument(
        "--logits_file",
        type=Path,
        default=None,
        help="saved logits (S, N, C) and labels (N,) instead",
    )
    made.add_argument("--save_logits", type=Path, default=None, help="keep them in this file")
    made.add_argument("--draws", type=int, default=10, help="S, the most a row can have")
    made.add_argument("--least", type=int, default=4, help="draws of the first round")
    made.add_argument("--round_size", type=int, default=2, help="draws of a later round")
    made.add_argument(
        "--standard_errors",
        type=float,
        nargs="*",
        default=[0.1, 0.05, 0.03, 0.02, 0.01],
        help="tried",
    )
    made.add_argument(
        "--fixed",
        type=int,
        nargs="*",
        default=[1, 2, 3, 5, 7],
        help="fixed numbers of draws to show",
    )
    made.add_argument(
        "--orders", type=int, default=20, help="orders of the draws that are replayed"
    )
    made.add_argument("--timed", action="store_true", help="time the rules on the model too")
    return made


def options_of(arguments: Sequence[str] | None) -> Namespace:
    """The options, found to go together."""
    made = parser()
    options = made.parse_args(arguments)
    if (options.posterior is None) == (options.logits_file is None):
        made.error("nothing, or two things, to measure: give either --posterior or --logits_file")
    if options.timed and options.posterior is None:
        made.error("saved logits have no model to time: give --posterior")
    return options


def draws_of(opened: Opened | None, options: Namespace) -> tuple[Tensor, Tensor]:
    """Logits (S, N, C) and labels (N,), from the posterior or from the file.

    Raises:
        ValueError: if the file has fewer draws than are asked for.
    """
    saved = load_file(options.logits_file) if opened is None else opened.draws(options)
    if options.save_logits is not None:
        save_file(saved, options.save_logits)
    logits, labels = saved["logits"], saved["labels"]
    if len(logits) < options.draws:
        raise ValueError(
            f"too few draws: got {len(logits)}, expected --draws {options.draws}; ask for fewer"
        )
    return logits[: options.draws], labels


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and reports."""
    options = options_of(arguments)
    device = device_of(options)
    where = environment(device)
    opened = Opened.of(options, device) if options.posterior is not None else None
    logits, labels = draws_of(opened, options)
    rules = rules_of(options, options.draws)
    cases = replayed(logits, labels, rules, options)
    if opened is not None and options.timed:
        cases += timed(opened, rules, options, device)
    source = (
        options.logits_file.name if opened is None else f"{options.posterior.name}, {options.task}"
    )
    rounds = f"rounds of {options.least} and then {options.round_size}"
    title = f"Draws used / {options.draws} draws: {source}, {len(labels)} rows, {rounds}"
    report("adaptive", title, cases, options, where)


if __name__ == "__main__":
    main()
