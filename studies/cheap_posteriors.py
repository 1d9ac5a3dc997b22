"""A posterior that is cheap by construction: noise on few tokens or in few blocks, trained so.

`run` fits the arms by letter scoring and appends a record for each to `--json`; what is there
already is not fitted again. An arm is fitted with every σ of `--stds` under the first seed, and
under the others with the one whose ten draws have the lowest NLL on the held-out rows. `cost`
measures what ten draws cost in passes of the mean, interleaved in one process. `table` prints all
records. The rows are parts of *train*, and for "topics" the embedded validation questions too.

Arms: "full" is BLoB. "tokens m" has noise on the last m tokens of the prompt alone, so that all
draws share what the mean reads before them; "adapter m" has the whole adapter there alone, so that
they share what the base reads. "blocks k" has noise in the last k blocks alone.
"""

import random
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from bayestune.adapters import (
    Lora,
    attach,
    bayesify,
    detach,
)
from bayestune.data import Question, Task, load_task
from bayestune.forward import Draws
from bayestune.kl import KLStep
from bayestune.methods import MLE
from bayestune.metrics import accuracy, ece, nll
from bayestune.models import LoadedModel, load_model
from bayestune.posteriors import Gaussian, Posterior
from bayestune.scoring import LetterScorer, row_logits
from bayestune.scoring.batches import batches_by_length
from bayestune.training import Training, fit_adapter
from bayestune.whole_files import read_json_lines, write_json_lines
from harness import Spread, environment, interleave, named, paired_ratios
from studies.calibration_cost import LastBlocks
from studies.cheap_arms import ARMS, Antithetic, Arm, Batch
from studies.cheap_table import best_std, fitted_average, table
from studies.topics import topics

S = 10
FEWER = (2, 3, 5, S)  # numbers of draws in which plain, antithetic and fitted draws are compared
PARTS = ("held_out", "evaluation")
RESULTS = Path(__file__).parents[1] / "results/cheap_posteriors/records.jsonl"
Record = dict[str, Any]


# The task


def task_of(options: Namespace) -> Task:
    """Rows to fit on, to choose σ on, and to report: no test row is among them."""
    further: tuple[Question, ...] = ()
    if options.task == "topics":
        task = topics()
        further = task.evaluation
    else:
        task = load_task(options.task, options.data_root)
    rows = list(task.train)
    random.Random(0).shuffle(rows)
    first = options.train_rows
    second = first + options.held_out_rows
    return replace(
        task,
        train=tuple(rows[:first]),
        held_out=tuple(rows[first:second]),
        evaluation=(*rows[second:], *further)[: options.rows],
    )


# The run


@dataclass(frozen=True)
class Bench:
    """The model, the task's rows and how all arms are trained."""

    loaded: LoadedModel
    task: Task
    training: Training
    batch: int

    def fitted(self, arm: Arm, std: float) -> Gaussian:
        """The arm's posterior; σ is half of the prior's."""
        scorer = arm.scorer(self.loaded, self.task)
        step = KLStep(2 * std, final_std=std, warmup_ratio=self.training.warmup_ratio)
        adapted, _ = fit_adapter(
            self.loaded.model, scorer, self.training, [step], prepare=arm.prepare
        )
        return arm.posterior(adapted, scorer)

    def logits(self, posterior: Posterior, draws: Draws, part: str) -> Tensor:
        """The logits (S, N, C) of a part's rows."""
        scorer: Any = posterior.scorer
        rows = scorer.encode(getattr(self.task, part))
        return row_logits(posterior, scorer, rows, draws, batch_size=self.batch)

    def figures(self, logits: Tensor, part: str) -> Record:
        """NLL, accuracy and ECE of the draws' average, and each row's loss."""
        return figures(logits.double().softmax(-1).mean(0), self.labels(part))

    def labels(self, part: str) -> Tensor:
        """The answers (N,) of a part's rows."""
        return torch.tensor([row.answer for row in getattr(self.task, part)])

    def measured(self, arm: Arm, std: float) -> Record:
        """Fits an arm; the figures of its mean and of its draws on both parts."""
        begin = perf_counter()
        posterior = self.fitted(arm, std)
        found: Record = {"fit_seconds": round(perf_counter() - begin, 1)}
        for part in PARTS:
            logits = self.logits(posterior, arm.draws(S), part)
            found[part] = {
                "mean": self.figures(self.logits(posterior, arm.draws(0), part), part),
                f"{S} draws": self.figures(logits, part),
            }
            if arm.kind == "full" and part == "evaluation":
                found[part] |= self.of_draws(posterior, logits, part)
        detach(posterior.model)
        return found

    def of_draws(self, posterior: Gaussian, logits: Tensor, part: str) -> Record:
        """Fewer draws: plain, antithetic, and each with a Gaussian fitted to the logits."""
        twins = Antithetic(posterior.model, posterior.scorer)
        antithetic = self.logits(twins, Draws(S, bf16=True), part)
        labels = self.labels(part)
        found: Record = {}
        for name, drawn_logits in (("plain", logits), ("antithetic", antithetic)):
            for count in FEWER:
                some = drawn_logits[:count].double()
                found[f"{name} {count}"] = figures(some.softmax(-1).mean(0), labels)
                found[f"{name} {count}, fitted"] = figures(fitted_average(some), labels)
        return found

    def mle(self) -> Record:
        """Plain LoRA."""
        begin = perf_counter()
        scorer = LetterScorer(self.loaded.tokenizer, self.task)
        point = MLE().fit(self.loaded.model, scorer, self.training)
        found: Record = {"fit_seconds": round(perf_counter() - begin, 1)}
        for part in PARTS:
            logits = self.logits(point, Draws(0, bf16=True), part)
            found[part] = {"mean": self.figures(logits, part)}
        detach(point.model)
        return found


def figures(probabilities: Tensor, labels: Tensor) -> Record:
    """NLL, accuracy and ECE, and each row's loss."""
    losses = -probabilities.gather(1, labels[:, None])[:, 0].log()
    return {
        "nll": nll(probabilities, labels),
        "accuracy": accuracy(probabilities, labels),
        "ece": ece(probabilities, labels),
        "losses": [round(loss, 5) for loss in losses.tolist()],
    }


def run(options: Namespace) -> None:
    """Fits the arms that are not in the file yet."""
    torch.set_num_threads(options.threads)
    lora = Lora(targets=("q_proj", "v_proj"))
    for seed in options.seeds:
        training = Training(
            lora=lora,
            steps=options.steps,
            learning_rate=options.learning_rate,
            seed=seed,
            bf16=True,
            progress=False,
        )
        loaded = load_model(options.model, dtype=torch.bfloat16)
        bench = Bench(loaded, task_of(options), training, options.batch)
        keep(options, bench, "mle", 0.0, bench.mle)
        for std in options.stds:
            for arm in (one for one in ARMS if one.name in options.arms):
                if seed == options.seeds[0] or std == chosen_std(options, arm.name):
                    keep(options, bench, arm.name, std, partial(bench.measured, arm, std))


def records_of(options: Namespace) -> list[Record]:
    """The records of the file."""
    return read_json_lines(options.json, missing_ok=True)


def chosen_std(options: Namespace, arm: str) -> float | None:
    """The σ of an arm's first seed that held-out rows choose, at the run's setting."""
    names = ("task", "steps", "learning_rate")
    setting = {name: getattr(options, name) for name in names}
    return best_std([one for one in records_of(options) if setting.items() <= one.items()], arm)


def keep(
    options: Namespace, bench: Bench, name: str, std: float, measure: Callable[[], Record]
) -> None:
    """Appends an arm's record, unless it is there."""
    key = {
        "study": "cheap_posteriors",
        "task": options.task,
        "model": named(options.model),
        "arm": name,
        "std": std,
        "seed": bench.training.seed,
        "steps": options.steps,
        "learning_rate": options.learning_rate,
        "rows": {part: len(getattr(bench.task, part)) for part in ("train", *PARTS)},
    }
    records = records_of(options)
    if any(key.items() <= record.items() for record in records):
        return
    record = {**key, **measure()}
    write_json_lines(options.json, [*records, record])
    ten = record["evaluation"].get(f"{S} draws", record["evaluation"]["mean"])
    print(f"{name}, σ {std}, seed {key['seed']}: NLL {ten['nll']:.3f}", flush=True)


def cost(options: Namespace) -> None:
    """What ten draws cost in passes of the mean, on batches of a task's train rows."""
    torch.set_num_threads(options.threads)
    task = task_of(options)
    loaded = load_model(options.model, dtype=torch.bfloat16)
    adapted = attach(loaded.model, Lora(targets=("q_proj", "v_proj")))
    bayesify(adapted)
    actions: dict[str, Callable[[int], object]] = {}
    batches: list[Batch] = []
    for arm in ARMS:
        scorer = arm.scorer(loaded, task)
        if not batches:
            rows = scorer.encode(task.train)[: 5 * options.batch]
            batches = [batch for _, batch in batches_by_length(scorer, rows, options.batch)]
            whole = Gaussian(adapted, scorer)
            actions["mean"] = _asks(whole, Draws(0, bf16=True), batches)
        posterior = arm.posterior(adapted, scorer)
        if arm.kind == "blocks":
            posterior = LastBlocks(adapted, scorer, blocks=arm.size)
        actions[arm.name] = _asks(posterior, arm.draws(S), batches)
    seconds = interleave(actions, options.turns, warmup=1)
    passes = {name: Spread.of(paired_ratios(seconds, (name, "mean"))) for name in actions}
    record = {
        "study": "cheap_posteriors, cost",
        "task": options.task,
        "model": named(options.model),
        "tokens": sum(batch["input_ids"].shape[1] for batch in batches) / len(batches),
        "batch": options.batch,
        "environment": environment(torch.device("cpu")),
        "passes": {name: asdict(spread) for name, spread in passes.items()},
    }
    write_json_lines(options.json, [*records_of(options), record])


def _asks(posterior: Posterior, draws: Draws, batches: Sequence[Batch]) -> Callable[[int], object]:
    def ask(turn: int) -> Tensor:
        batch = dict(batches[turn % len(batches)])
        batch.pop("labels", None)
        return posterior.logits(batch, draws)

    return ask


def show(options: Namespace) -> None:
    """Prints the table of all records."""
    print(table(records_of(options)))


STEPS = {"run": run, "cost": cost, "table": show}


def parser() -> ArgumentParser:
    """The command's options."""
    made = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    add = made.add_argument
    add("step", choices=list(STEPS), help="what to do")
    add("--model", default=None, help="directory or name of a causal model")
    add("--task", default="topics", help='"topics", or one of the public tasks')
    add("--data_root", type=Path, default=None, help="folder of the data sets; left out: the Hub")
    add("--train_rows", type=int, default=96, help="to fit on")
    add("--held_out_rows", type=int, default=60, help="to choose σ on")
    add("--rows", type=int, default=120, help="to report")
    names = [arm.name for arm in ARMS]
    add("--arms", nargs="+", default=names, choices=names, help="which to fit")
    add("--stds", type=float, nargs="+", default=[0.1, 0.3], help="σ to end at, half the prior's")
    add("--seeds", type=int, nargs="+", default=[1, 2], help="the first one chooses σ")
    add("--steps", type=int, default=120, help="of each fit, with batch 4")
    add("--learning_rate", type=float, default=1e-3, help="of each fit")
    add("--batch", type=int, default=8, help="rows of a batch of predictions")
    add("--turns", type=int, default=10, help="of the measurement of cost")
    add("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    add("--json", type=Path, default=RESULTS, help="file of the records, one a line")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Does one of the steps."""
    options = parser().parse_args(arguments)
    STEPS[options.step](options)


if __name__ == "__main__":
    main()
