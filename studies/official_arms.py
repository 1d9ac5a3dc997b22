"""The arms of `official_results`: the authors' code, ours in its manner, ours as in the grid."""

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback

from bayestune.adapters import GaussianLinear, Lora, Slots, bayesify
from bayestune.data import Question, Task
from bayestune.forward import Draws
from bayestune.kl import KLStep
from bayestune.methods import MLE, AuthorsBLoB, described, make_method
from bayestune.metrics import accuracy, brier, ece, nll
from bayestune.posteriors import Point, TokenNoise
from bayestune.scoring import Encoded, LetterScorer, row_logits
from bayestune.training import Training, fit_adapter
from studies.official_runs import TARGETS, Evaluated, Official, put_start, settings_of

THEIRS, MANNER, AS_GRID = "theirs", "ours in its manner", "ours as in the grid"
# arm: whose code, which method
ARMS = {
    f"{name}, {whose}": (whose, name)
    for name in ("BLoB", "MLE")
    for whose in (THEIRS, MANNER, AS_GRID)
}
IN_ITS_MANNER = AuthorsBLoB(prior_std=0.2, init_root_std=0.05, kl_lr=0.01)
Record = dict[str, Any]


@dataclass(frozen=True)
class Fitted:
    """What a fit gives: what evaluates it with so many draws, its settings, the mean σ of A."""

    evaluate: Callable[[int], Evaluated]
    settings: Record
    std: float | None


@dataclass
class TheirPrompts(LetterScorer):
    """Letter scoring of prompts and answer tokens that the authors' code has made.

    Args:
        prompts: token ids by the row's id.
        letters: the token of each answer.
    """

    prompts: Mapping[str, list[int]] = field(kw_only=True)
    letters: list[int] = field(kw_only=True)

    @cached_property
    def tokens(self) -> list[int]:
        """The token of each label."""
        return self.letters

    def encode_row(self, row: Question) -> Encoded:
        """Token ids of the prompt, and the number of options."""
        ids = self.prompts[row.id]
        return {"ids": ids, "options": len(row.options), "length": len(ids), "shortened": False}


class InOrder(TrainerCallback):
    """Has a Trainer take its rows in their own order in every epoch, as the authors' loader."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Puts the order in the place of the random one."""
        loader = kwargs["train_dataloader"]
        loader.batch_sampler.sampler = SequentialSampler(loader.dataset)


@dataclass(frozen=True)
class Bench:
    """One seed's rows and prompts, and what fits and evaluates on them.

    Args:
        official: the authors' code.
        task: the rows.
        scorer: of the authors' prompts.
        training: of the grid.
        blob: of the grid.
        draws: N.
    """

    official: Official
    task: Task
    scorer: TheirPrompts
    training: Training
    blob: Mapping[str, Any]
    draws: int

    def measured(self, arm: str) -> list[tuple[Record, Tensor]]:
        """A record's figures and probabilities (N, C) for each number of draws of an arm."""
        whose, method = ARMS[arm]
        begin = time.perf_counter()
        fitted = self._fits()[whose](method.lower())
        fit = round(time.perf_counter() - begin, 1)
        labels = torch.tensor([row.answer for row in self.task.evaluation])
        found = []
        for count in sorted(draws_of(arm, self.draws)):
            begin = time.perf_counter()
            evaluated = fitted.evaluate(count)
            seconds = {"fit": fit, "predict": round(time.perf_counter() - begin, 1)}
            probabilities = evaluated.logits.double().softmax(-1).mean(0)
            figures = figures_of(probabilities, labels)
            record: Record = {"draws": count, "settings": fitted.settings, "std": fitted.std}
            record["figures"] = figures
            if evaluated.told:
                record["told"] = evaluated.told
            found.append(({**record, "seconds": seconds}, probabilities))
        return found

    def _fits(self) -> dict[str, Callable[[str], Fitted]]:
        return {THEIRS: self.theirs, MANNER: self.in_its_manner, AS_GRID: self.as_in_the_grid}

    def theirs(self, kind: str) -> Fitted:
        """A fit of the authors' code, as their script has it."""
        run = self.official.run(kind, self.training.seed)
        run.fit()
        settings = settings_of(run.wrapper.args) | {"targets": list(TARGETS)}
        return Fitted(run.evaluate, settings, run.std())

    def in_its_manner(self, kind: str) -> Fitted:
        """A fit of ours from their start, in their order and with their settings."""
        run = self.official.run(kind, self.training.seed)
        start = run.values()
        training = manner_of(run.wrapper.args, bf16=self.training.bf16)
        del run
        gaussian = kind == "blob"

        def prepare(adapted: nn.Module) -> None:
            if gaussian:
                bayesify(adapted, noise=IN_ITS_MANNER.noise)
            put_start(adapted, start)

        callbacks = [InOrder(), *([kl_step(training)] if gaussian else [])]
        base = self.official.loaded.again().model
        adapted, _ = fit_adapter(base, self.scorer, training, callbacks, prepare=prepare)
        posterior = (TokenNoise if gaussian else Point)(adapted, self.scorer)
        method = described(IN_ITS_MANNER if gaussian else MLE())
        return self._fitted(posterior, {**method, "training": asdict(training)})

    def as_in_the_grid(self, kind: str) -> Fitted:
        """A fit of ours as the grid has it, on the same rows and prompts."""
        method = make_method({"method": kind, **(self.blob if kind == "blob" else {})})
        base = self.official.loaded.again().model
        posterior = method.fit(base, self.scorer, self.training)
        return self._fitted(posterior, {**described(method), "training": asdict(self.training)})

    def _fitted(self, posterior: Any, settings: Record) -> Fitted:
        rows = self.scorer.encode(self.task.evaluation)

        def evaluate(count: int) -> Evaluated:
            draws = Draws(count, bf16=self.training.bf16)
            return Evaluated(row_logits(posterior, self.scorer, rows, draws), {})

        layers = Slots(posterior.model).of_kind(GaussianLinear).values()
        stds = [layer.std.mean() for layer in layers]
        return Fitted(evaluate, settings, torch.stack(stds).mean().item() if stds else None)


def draws_of(arm: str, draws: int) -> set[int]:
    """The numbers of draws that an arm is evaluated with: BLoB with none, the mean, and with N."""
    return {0, draws} if ARMS[arm][1] == "BLoB" else {0}


def figures_of(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """The figures of probabilities (N, C)."""
    metrics = {"nll": nll, "ece": ece, "accuracy": accuracy, "brier": brier}
    return {name: metric(probabilities, labels) for name, metric in metrics.items()}


def manner_of(arguments: argparse.Namespace, *, bf16: bool) -> Training:
    """The training that their arguments mean."""
    lora = Lora(arguments.lora_r, arguments.lora_alpha, arguments.lora_dropout, TARGETS)
    return Training(
        lora=lora,
        steps=arguments.max_train_steps,
        batch_size=arguments.batch_size,
        learning_rate=arguments.lr,
        warmup_ratio=arguments.warmup_ratio,
        weight_decay=arguments.opt_wd,
        seed=arguments.seed,
        bf16=bf16,
        progress=False,
    )


def kl_step(training: Training) -> KLStep:
    """The KL step of `IN_ITS_MANNER`, whose period follows from rows and batch as theirs does."""
    own = IN_ITS_MANNER
    return KLStep(
        own.prior_std,
        kl_lr=own.kl_lr,
        schedule=own.schedule,
        warmup_ratio=training.warmup_ratio,
        std_optimizer=own.std_optimizer,
    )
