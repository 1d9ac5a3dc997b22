"""The model card of a posterior's folder: what its files and its records say, and nothing else."""

import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from bayestune.evaluation import Record
from bayestune.report import summary_tables
from bayestune.sharing.card_text import body
from bayestune.sharing.known import Known

CARD = "README.md"
_DIGEST = re.compile(r"<!-- bayestune card of posterior ([0-9a-f]{64}) -->")
_METRICS = {
    "accuracy": "Accuracy",
    "nll": "NLL",
    "brier": "Brier score",
    "ece": "ECE",
    "aurc": "AURC",
}


def make_card(known: Known, repo_id: str | None = None) -> ModelCard:
    """The model card of a posterior.

    Args:
        known: what is known of it.
        repo_id: of the repository that it is for, which names it; None to name it by its folder.
    """
    data = ModelCardData(
        base_model=known.base_on_hub,
        library_name="peft",
        tags=_tags(known),
        pipeline_tag="text-classification" if known.details.get("scoring") == "head" else None,
        model_name=(repo_id or known.place.resolve().name).rpartition("/")[2],
        eval_results=_results(known) or None,
    )
    text = body(known, repo_id, summary_tables(known.records) if known.records else [])
    mark = f"<!-- bayestune card of posterior {known.digest} -->"
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n\n{mark}\n")


def _tags(known: Known) -> list[str]:
    own = [known.details["method"]] if "method" in known.details else []
    return ["lora", "bayestune", "bayesian", "uncertainty", *own]


def _results(known: Known) -> list[EvalResult]:
    """Each metric of each record, with its interval and number of rows."""
    results = []
    has_head = known.details.get("scoring") == "head"
    for record in known.records:
        for name, title in _METRICS.items():
            metric = record["metrics"].get(name)
            if not metric or metric["value"] is None:
                continue
            args = {"n": record["n"], "low": metric.get("low"), "high": metric.get("high")}
            if name == "ece":
                args["bins"] = record.get("bins")
            results.append(
                EvalResult(
                    task_type="text-classification" if has_head else "multiple-choice",
                    dataset_type=record["task"],
                    dataset_name=record["task"],
                    dataset_split=record.get("rows"),
                    metric_type=name,
                    metric_name=f"{title}, {record['label']}",
                    metric_value=metric["value"],
                    metric_args={key: value for key, value in args.items() if value is not None},
                )
            )
    return results


def card_digest(text: str) -> str | None:
    """The digest of the posterior that a card is of; None if it is not one of ours."""
    match = _DIGEST.search(text)
    return match[1] if match else None


def write_card(
    folder: str | PathLike[str],
    *,
    records: Sequence[Record] | None = None,
    base_model: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes `README.md` into a posterior's folder: how it was fitted, its figures, how to load it.

    What neither the folder nor a record says is left out.

    Args:
        folder: of `fit`, or a LoRA adapter's.
        records: of its evaluations; None for those that lie in the folder.
        base_model: what the base model is called on the Hub, where the fit took it from a folder.
        overwrite: whether a card that is there is replaced.

    Returns:
        The card's path.

    Raises:
        Refusal: if records are given and none is of this posterior.
        FileExistsError: if there is a card already, unless it is to be replaced.
    """
    known = Known.of(folder, records, base_model)
    path = known.place / CARD
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already: give --overwrite to write it anew")
    card = make_card(known)
    path.write_text(str(card), encoding="utf-8")
    return path
