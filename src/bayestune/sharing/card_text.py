"""The text of a model card, part by part; a part about which nothing is known is left out."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bayestune.data import Prompt
from bayestune.report import Table, promises, render
from bayestune.session import name_in_records, prompt_of_fit
from bayestune.sharing.known import Known

_TRAINING = ("batch_size", "accumulation", "learning_rate", "seed", "bf16")
_EXPORTED = ("gaussian", "scaled", "low_rank", "sampled")  # kinds whose draws are adapters
_MEANING = {
    "letter": "Each is the average over draws of the softmax over the row's option labels, at the "
    "place of the answer.",
    "text": "Each is the average over draws of the softmax over the likelihoods of the options' "
    "texts.",
    "head": "Each is the average over draws of the softmax over the head's classes.",
}


def body(known: Known, repo_id: str | None, tables: Sequence[Table]) -> str:
    """The card's text under its metadata."""
    name = repo_id or known.place.resolve().name
    parts = [f"# {name}", _summary(known), _fit(known), _meaning(known), _figures(tables)]
    parts += [_decisions(known), _loading(known, repo_id or "FOLDER")]
    return "\n\n".join(part for part in parts if part)


def _summary(known: Known) -> str:
    base = f" of `{name_in_records(known.base)}`" if known.base else ""
    if not known.details:
        return f"A LoRA adapter{base}."
    is_point = known.details["posterior"] == "point"
    kind = "A LoRA adapter" if is_point else "A distribution over LoRA adapters"
    text = f"{kind}{base}, fitted with bayestune."
    if known.lora:
        text += (
            " `adapter_config.json` and `adapter_model.safetensors` are a stock adapter, which PEFT"
            " loads by itself; `posterior.json` and `posterior.safetensors` hold the rest."
        )
    return text


def _fit(known: Known) -> str:
    lines = [f"| {name} | {value} |" for name, value in _facts(known)]
    return "\n".join(["## The fit", "", "| | |", "|---|---|", *lines]) if lines else ""


def _facts(known: Known) -> Iterator[tuple[str, str]]:
    """The lines of the table about the fit: a name and a value each."""
    yield from _of_method(known)
    details = known.details
    if "task" in details:
        yield "task", f"{details['task']['name']}, scored by {details['scoring']}"
    if details.get("train_rows"):
        yield "training rows", str(details["train_rows"])
    if known.report is not None and known.report.steps:
        yield "optimiser's steps", str(known.report.steps)
    training: Mapping[str, Any] = details.get("training", {})
    settings = [f"`{name}={training[name]}`" for name in _TRAINING if name in training]
    if settings:
        yield "training", ", ".join(settings)
    if known.lora:
        targets = known.lora.get("target_modules")
        listed = ", ".join(sorted(targets)) if isinstance(targets, list) else targets
        ranks = f"rank {known.lora.get('r')}, alpha {known.lora.get('lora_alpha')}"
        yield "LoRA", f"{ranks}, on {listed}"


def _of_method(known: Known) -> Iterator[tuple[str, str]]:
    """The method, its prior and its settings."""
    asked_for = known.details.get("fields", {})
    fields = known.report.settled(asked_for) if known.report else dict(asked_for)
    if "method" in fields:
        yield "method", f"`{fields.pop('method')}`"
    base = fields.pop("base", None)
    if isinstance(base, Mapping):
        yield "on top of", f"`{base['method']}`"
    if (prior_std := fields.pop("prior_std", None)) is not None:
        yield "prior", f"N(0, σ²) on the entries of {known.sides}, σ = {prior_std:g}"
    if known.std is not None:
        entries = f"the entries of {known.sides}"
        yield "posterior", f"mean standard deviation of {entries}: {known.std:.4g}"
    settings = [f"`{key}={value}`" for key, value in fields.items() if value is not None]
    if settings:
        yield "settings", ", ".join(settings)


def _meaning(known: Known) -> str:
    if "task" not in known.details:
        return ""
    scoring = known.details["scoring"]
    prompt: Prompt = prompt_of_fit(known.details)
    text = (
        f"## What the probabilities mean\n\n{_MEANING[scoring]} Mutual information says how much "
        "the draws disagree. Both are about rows like those of the training, put as they were there"
    )
    if scoring == "head":
        return f"{text}."
    fence = "```"
    return f"{text}:\n\n{fence}text\n{prompt.template(scoring)}\n{fence}"


def _figures(tables: Sequence[Table]) -> str:
    return f"## Calibration\n\n{render(tables, 'markdown')}" if tables else ""


def _decisions(known: Known) -> str:
    calibration = known.calibration
    if calibration is None:
        return ""
    choosing = f"{calibration.num_choosing} held-out rows to choose on"
    promising = f"{calibration.num_thresholds} to promise on"
    head = f"## When to act\n\n`calibration.json`, of {choosing}, {promising}:"
    return f"{head}\n\n```text\n{promises(calibration)}\n```"


def _loading(known: Known, name: str) -> str:
    base = known.base_on_hub or "BASE"
    has_head = known.details.get("scoring") == "head"
    kind = "AutoModelForSequenceClassification" if has_head else "AutoModelForCausalLM"
    classes = f", num_labels={known.details['classes']}" if has_head else ""
    load = f'base = {kind}.from_pretrained("{base}"{classes})'
    parts = ["## Load"]
    if known.lora:
        parts.append(
            "The mean, with PEFT alone:\n\n```python\nfrom peft import PeftModel\n"
            f"from transformers import {kind}\n\n{load}\n"
            f'model = PeftModel.from_pretrained(base, "{name}")\n```'
        )
    if known.details:
        parts.append(
            "The posterior:\n\n```python\nimport bayestune\n"
            f"from transformers import {kind}\n\n{load}\n"
            f'posterior = bayestune.load_posterior(base, "{name}")\n```'
        )
    if "method" in known.details:
        lines = [f"bayestune predict {name} --rows rows.jsonl"]
        if known.details["posterior"] in _EXPORTED:
            lines.append(f"bayestune export {name} --draws 8 --to served  # for LoRA servers")
        parts.append("\n".join(["```bash", *lines, "```"]))
    return "\n\n".join(parts)
