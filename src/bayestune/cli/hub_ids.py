"""Posteriors that a command is given by their id on the Hub become folders of its cache."""

from pathlib import Path

from jsonargparse import Namespace

from bayestune.errors import Refusal
from bayestune.posteriors import artefact_folder, is_hub_id

_NAMED = ("posterior", "posteriors", "student", "adapter")
_WRITE_BESIDE = ("calibrate", "card", "push")


def fetch(command: str, options: Namespace) -> None:
    """Puts folders in the place of Hub ids, such as owner/name or owner/name@revision.

    Raises:
        Refusal: if the command would write into the folder, which is the Hub's.
    """
    for name in _NAMED:
        given = options.get(name)
        if isinstance(given, list):
            options[name] = [_fetched(command, options, path) for path in given]
        elif given is not None:
            options[name] = _fetched(command, options, given)


def _fetched(command: str, options: Namespace, given: Path) -> Path:
    mistyped = given.parent.is_dir()  # a folder that is not in one that is here
    if mistyped or not is_hub_id(str(given)):
        return given
    beside = command == "evaluate" and options.output is None
    if beside or command in _WRITE_BESIDE:
        remedy = "give --output" if beside else f"download it: hf download {given} --local-dir DIR"
        raise Refusal(
            f"got {given} on the Hub, expected a folder of this machine, into which {command!r} "
            f"writes; {remedy}"
        )
    return artefact_folder(str(given))
