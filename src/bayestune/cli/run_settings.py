"""The settings that a run was started with: `--resume` refuses to go on with others.

They lie in `run.json` of a run's folder, or hidden beside an output file.
"""

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
from bayestune.session import TaskOptions, name_in_records
from bayestune.training import Training
from bayestune.whole_files import write_text_whole

logger = logging.getLogger(__name__)

RUN = "run.json"
Settings = dict[str, Any]  # as JSON holds them, by the names of the options

# options of a task that name files: what these hold counts, not where they lie
_FILES = ("data_root", "data", "evaluation_data", "unlabelled_data", "prompt")
_OF_EVALUATION = ("evaluation_rows",)  # options of a task that no fit depends on


def fit_settings(
    model: str | None,
    session_options: tuple[TaskOptions, Task, str],
    training: Training,
    methods: Mapping[str, Method],
) -> Settings:
    """What determines the fits of a run.

    Args:
        model: of `--model`.
        session_options: the options of the task, the task as they load it, and `--dtype`.
        training: of each fit.
        methods: by name.
    """
    options, task, dtype = session_options
    settings: Settings = {"model": name_in_records(model) if model else None, "dtype": dtype}
    settings["the files of --model"] = digest(model_facts(model))
    settings["the weights of --model"] = weights_digest(model)
    for name, value in asdict(options).items():
        if name not in (*_FILES, *_OF_EVALUATION):
            settings[name] = value
    settings["the text of --prompt"] = digest(task.prompt)
    settings |= dict(_by_dotted_name(lasting(training)))
    settings["the rows of --data"] = rows_digest(task.train)
    settings["the held-out rows"] = rows_digest(task.held_out)
    settings["the rows of --unlabelled_data"] = rows_digest(task.unlabelled)
    for name, method in methods.items():
        settings |= dict(_by_dotted_name(lasting_method(method), f"{name}."))
    return plain_settings(settings)


def evaluation_settings(rows: Sequence[Question], options: EvaluationOptions) -> Settings:
    """What determines the records of a run beside its fits.

    Args:
        rows: to evaluate on.
        options: of the evaluation.
    """
    return plain_settings({**lasting(options), "the rows of --evaluation_data": rows_digest(rows)})


def _by_dotted_name(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as pairs of a name such as "lora.rank" and a value."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _by_dotted_name(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def plain_settings(settings: Settings) -> Settings:
    """The settings as they are read back from JSON, so that they can be compared with those."""
    return json.loads(json.dumps(settings, default=str))


def settings_file(place: Path) -> Path:
    """The file of the settings: in a run's folder, or hidden beside an output file."""
    return place / RUN if place.is_dir() else place.with_name(f".{place.name}.{RUN}")


def write_settings(place: Path, settings: Settings) -> None:
    """Writes what a run is started with.

    Args:
        place: the run's folder, or its output file.
        settings: of the run.
    """
    content = {"bayestune": bayestune.__version__, "settings": settings}
    text = json.dumps(content, indent=1, ensure_ascii=False)
    write_text_whole(settings_file(place), f"{text}\n")


def read_settings(place: Path) -> Settings | None:
    """What the run in a folder, or of an output file, was started with; None if nothing says so."""
    try:
        content = json.loads(settings_file(place).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or "bayestune" not in content:
        return None
    settings = content.get("settings")
    return settings if isinstance(settings, dict) else None


def check_same(place: Path, settings: Settings) -> None:
    """Refuses to resume a run that was started with other settings.

    Args:
        place: the run's folder, or its output file.
        settings: of the command that resumes.

    Raises:
        Refusal: if they differ; it names the settings, with the new and the old values.
    """
    before = read_settings(place)
    if before is None:
        if place.is_dir() and any(place.iterdir()):
            warning = (
                "%s does not say which settings its run was started with: they are not compared"
            )
            logger.warning(warning, place)
        return
    difference = other_settings(settings, before, "the run")
    if difference:
        raise Refusal(
            f"--resume goes on with the run in {place}, {difference}; give those of the run, or "
            "choose another --output"
        )
