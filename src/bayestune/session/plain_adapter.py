"""A plain LoRA adapter: whoever calibrates it says what a fit's folder would say of it."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from bayestune.data import Task
from bayestune.decisions import FILE_NAME, Calibration
from bayestune.errors import Refusal
from bayestune.posteriors import (
    DETAILS,
    Posterior,
    artefact_folder,
    base_name,
    load_adapter,
    load_posterior,
    posterior_digest,
    read_details,
)
from bayestune.session.opened_model import Dtype, num_classes
from bayestune.session.task_options import TaskOptions

PLAIN = "lora"  # the method that records name for a plain adapter


def is_plain(folder: Path) -> bool:
    """Whether a folder holds a LoRA adapter without a posterior's files."""
    return not (artefact_folder(folder) / DETAILS).is_file()


def details_if_any(place: Path) -> dict[str, Any]:
    """What an artefact's `posterior.json` says; empty for a plain adapter, which has none."""
    return {} if is_plain(place) else read_details(place)


def load_posterior_or_adapter(base: nn.Module, place: Path) -> Posterior:
    """Loads what a folder holds onto its base model: a posterior, or a plain adapter as a point.

    Args:
        base: the base model.
        place: the folder.
    """
    return (load_adapter if is_plain(place) else load_posterior)(base, place)


def name_of_base(place: Path, details: Mapping[str, Any], model: str | None = None) -> str:
    """The name of an artefact's base model.

    Args:
        place: its folder.
        details: what its `posterior.json` says.
        model: the base where it has moved, which takes precedence.

    Raises:
        Refusal: if none of these names one, nor the adapter itself.
    """
    name = model or details.get("base_model") or base_name(place)
    if not name:
        raise Refusal(f"{place} does not name its base model; expected a name; give --model")
    return name


def told_details(base_model: str, task: Task, options: TaskOptions, dtype: Dtype) -> dict[str, Any]:
    """What `posterior.json` would say, for an adapter that was trained elsewhere."""
    return {
        "method": PLAIN,
        "fields": {"method": PLAIN},
        "base_model": base_model,
        "task": {"name": task.name, "prompt": asdict(task.prompt)},
        "scoring": options.scoring,
        "classes": num_classes(task, options.scoring),
        "class_names": task.class_names if options.scoring == "head" else None,
        "dtype": dtype,
        "max_length": options.max_length,
        "training": {"bf16": False, "seed": 0},
        "questions": options.recorded(),
        "train_rows": None,
    }


def calibrated_details(folder: Path) -> dict[str, Any] | None:
    """What the calibration of a plain adapter keeps in the place of `posterior.json`.

    None for a posterior, and for an adapter that has no calibration.

    Raises:
        Refusal: if the adapter has changed since it was calibrated.
    """
    if not Path(folder).is_dir() or not is_plain(folder):
        return None
    place = artefact_folder(folder)
    if not (place / FILE_NAME).is_file():
        return None
    calibration = Calibration.read(place, posterior_digest(place))
    return calibration.settings.get("adapter") if calibration else None
