"""What a fit of several parts was started with, so that it goes on with the same parts or anew."""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bayestune.adapters import Lora, frozen_samples
from bayestune.data import digest, rows_digest
from bayestune.errors import Refusal
from bayestune.methods.asking import ASKED
from bayestune.methods.method import Method
from bayestune.posteriors import DETAILS
from bayestune.runtime import in_first_process
from bayestune.scoring import Scorer
from bayestune.training import Training, start_anew
from bayestune.whole_files import write_text_whole

STARTED = "started.json"
TAUGHT = "taught.json"
LOSSES_BY_NOISE = "noise_choice.json"
# files by which a resumed fit finds that a part of it is done
_MARKERS = (STARTED, DETAILS, TAUGHT, LOSSES_BY_NOISE, ASKED)

Facts = Mapping[str, Any]


def facts_of(
    method: Method, model: nn.Module, scorer: Scorer, training: Training
) -> dict[str, Any]:
    """What determines a fit, by the names of its settings: JSON values."""
    task = scorer.task
    facts = dict(_settings(method))
    facts |= _settings(training, "training.")
    facts["the base model"] = _description_of(model)
    facts["the base model's weights"] = digest(frozen_samples(model)["tensors"])
    facts["max_length"] = scorer.max_length
    facts["the prompt"] = digest([type(scorer).__name__, str(task.prompt)])
    facts["the training rows"] = rows_digest(task.train)
    facts["the held-out rows"] = rows_digest(task.held_out)
    facts["the unlabelled rows"] = rows_digest(task.unlabelled)
    return facts


def _description_of(model: nn.Module) -> str:
    """A base model's name, class and size."""
    name = Path(str(getattr(getattr(model, "config", None), "name_or_path", "") or "unnamed")).name
    base = [value for path, value in model.named_parameters() if "lora_" not in path]
    return f"{name}, a {type(model).__name__} of {sum(map(Tensor.numel, base))} parameters"


def check_started(place: Path, facts: Facts, parts: Collection[Path] = (), *, resume: bool) -> None:
    """Records the settings that a fit is started with, or compares them if it is resumed.

    A fit that starts anew reuses nothing of an earlier one in the folder: the files by which the
    earlier one's parts would be found are removed first.

    Args:
        place: the folder of the fit.
        facts: what `facts_of` returns.
        parts: the folders of its parts; a posterior that was saved in one of them itself stays.
        resume: whether it goes on with the parts that are there.

    Raises:
        Refusal: if it is resumed and the folder is of a fit with other settings.
    """
    in_first_process(partial(_begin, place, facts, parts, resume))


def _begin(place: Path, facts: Facts, parts: Collection[Path], resume: bool) -> None:
    file = place / STARTED
    if resume and file.is_file():
        difference = other_settings(facts, json.loads(file.read_text(encoding="utf-8")), "the fit")
        if difference:
            raise Refusal(
                f"resume=True goes on with the fit in {place}, {difference}; give those, or "
                "another output, or leave resume out"
            )
        return
    if resume and place.is_dir() and any(place.iterdir()):
        return  # of an earlier version, which recorded nothing
    for part in () if resume else parts:
        _forget(part)
    place.mkdir(parents=True, exist_ok=True)
    write_text_whole(file, json.dumps(facts, indent=1))


def _forget(part: Path) -> None:
    for name in _MARKERS:
        for marker in part.rglob(name):
            if marker != part / DETAILS:  # that of a posterior saved in the folder itself stays
                marker.unlink()
    for checkpoint in part.rglob("checkpoint-*"):
        start_anew(checkpoint.parent)


def other_settings(now: Facts, before: Facts, whose: str) -> str | None:
    """The end of a message that names the settings in which two runs differ, new and old.

    A setting that only one of the runs has, such as those of a method that is added, does not
    count.

    Args:
        now: the settings that were given.
        before: those of the run that is there.
        whose: what that run is called in the message.

    Returns:
        The text; None if the runs do not differ.
    """
    differ = [name for name in now if name in before and now[name] != before[name]]
    differences = [f"{name}: got {now[name]!r}, {whose} has {before[name]!r}" for name in differ]
    return f"which was started with other settings; {'; '.join(differences)}" if differ else None


def _settings(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The fields that change a result, a base's too; those that no file can hold are left out."""
    wrapped = getattr(value, "method", None)
    if hasattr(wrapped, "fit"):
        yield from _settings(wrapped, prefix)
    elif hasattr(value, "fit"):
        yield f"{prefix}method", type(value).__name__
    for field in fields(value):
        inner = getattr(value, field.name)
        name = f"{prefix}{field.name}"
        if not field.metadata.get("changes_result", True) or field.name == "method":
            continue
        if hasattr(inner, "fit") or isinstance(inner, Lora):
            yield from _settings(inner, f"{name}.")
        elif inner is None or isinstance(inner, str | int | float | list | tuple | Mapping):
            yield name, json.loads(json.dumps(inner, default=str))
