"""A plain LoRA adapter: what a fit would have noted of it, told by whoever calibrates it."""

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

PLAIN = "lora"  # the method of records


def is_plain(folder: Path) -> bool:
    """Whether a folder holds a LoRA adapter without a posterior's files."""
    return not (artefact_folder(folder) / DETAILS).is_file()


def details_if_any(place: Path) -> dict[str, Any]:
    """What an artefact's `posterior.json` says; nothing of a plain adapter."""
    return {} if is_plain(place) else read_details(place)


def load_any(base: nn.Module, place: Path) -> Posterior:
    """What a folder holds, on its base: a posterior, or a plain adapter as a point."""
    return (load_adapter if is_plain(place) else load_posterior)(base, place)


def named_base(place: Path, details: Mapping[str, Any], model: str | None = None) -> str:
    """The name of an artefact's base model.

    Args:
        place: its folder.
        details: what its `posterior.json` says.
        model: the base where it has moved, which goes before.

    Raises:
        Refusal: if nobody names one.
    """
    name = model or details.get("base_model") or base_name(place)
    if not name:
        raise Refusal(f"{place} does not name its base model; expected a name; give --model")
    return name


def told_details(base_model: str, task: Task, options: TaskOptions, dtype: Dtype) -> dict[str, Any]:
    """What `posterior.json` would say, of an adapter that somebody else trained."""
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
    """What the calibration of a plain adapter kept; None of a posterior, or if there is none.

    Raises:
        Refusal: if the adapter has changed since.
    """
    if not Path(folder).is_dir() or not is_plain(folder):
        return None
    place = artefact_folder(folder)
    if not (place / FILE_NAME).is_file():
        return None
    calibration = Calibration.read(place, posterior_digest(place))
    return calibration.settings.get("adapter") if calibration else None
