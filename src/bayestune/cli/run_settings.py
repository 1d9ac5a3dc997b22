"""What a run was started with, so that `--resume` goes on with the same run or not at all."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import bayestune
from bayestune.bench import digest, lasting, lasting_method, model_facts, weights_digest
from bayestune.data import Question, Task, rows_digest
from bayestune.errors import Refusal
from bayestune.evaluation import EvaluationOptions
from bayestune.methods import Method, other_settings
from bayestune.session import TaskOptions, shown
from bayestune.training import Training
from bayestune.whole_files import write_text_whole

logger = logging.getLogger(__name__)

RUN = "run.json"
# what stands in these files counts, not where they lie
_FILES = ("data_root", "data", "evaluation_data", "unlabelled_data", "prompt")
_OF_EVALUATION = ("evaluation_rows",)

Settings = dict[str, Any]


def fit_settings(
    model: str | None,
    session_options: tuple[TaskOptions, Task, str],
    training: Training,
    methods: Mapping[str, Method],
) -> Settings:
    """What determines the fits of a run, by the names of the options."""
    options, task, dtype = session_options
    found: Settings = {"model": shown(model) if model else None, "dtype": dtype}
    found["the files of --model"] = digest(model_facts(model))
    found["the weights of --model"] = weights_digest(model)
    for name, value in asdict(options).items():
        if name not in (*_FILES, *_OF_EVALUATION):
            found[name] = value
    found["the text of --prompt"] = digest(task.prompt)
    found |= dict(_flat(lasting(training)))
    found["the rows of --data"] = rows_digest(task.train)
    found["the held-out rows"] = rows_digest(task.held_out)
    found["the rows of --unlabelled_data"] = rows_digest(task.unlabelled)
    for name, method in methods.items():
        found |= dict(_flat(lasting_method(method), f"{name}."))
    return plain_settings(found)


def evaluation_settings(rows: Sequence[Question], options: EvaluationOptions) -> Settings:
    """What determines the records of a run beside its fits."""
    return plain_settings({**lasting(options), "the rows of --evaluation_data": rows_digest(rows)})


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def plain_settings(settings: Settings) -> Settings:
    """The settings as they are read back from JSON."""
    return json.loads(json.dumps(settings, default=str))


def settings_file(place: Path) -> Path:
    """Where the settings are: in a folder, or hidden beside a file."""
    return place / RUN if place.is_dir() else place.with_name(f".{place.name}.{RUN}")


def write_settings(place: Path, settings: Settings) -> None:
    """Notes what a run is started with."""
    noted = {"bayestune": bayestune.__version__, "settings": settings}
    text = json.dumps(noted, indent=1, ensure_ascii=False)
    write_text_whole(settings_file(place), f"{text}\n")


def read_settings(place: Path) -> Settings | None:
    """What the run in a place was started with; None if nothing says so."""
    try:
        noted = json.loads(settings_file(place).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = noted.get("settings") if isinstance(noted, dict) and "bayestune" in noted else None
    return found if isinstance(found, dict) else None


def check_same(place: Path, settings: Settings) -> None:
    """Refuses to resume a run that was started with other settings, by name, new and old."""
    before = read_settings(place)
    if before is None:
        if place.is_dir() and any(place.iterdir()):
            said = "%s does not say which settings its run was started with: they are not compared"
            logger.warning(said, place)
        return
    difference = other_settings(settings, before, "the run")
    if difference:
        raise Refusal(
            f"--resume goes on with the run in {place}, {difference}; give those of the run, or "
            "choose another --output"
        )
