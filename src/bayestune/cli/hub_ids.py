"""Fetches posteriors that a command is given by their id on the Hub."""

from pathlib import Path

from jsonargparse import Namespace

from bayestune.errors import Refusal
from bayestune.posteriors import artefact_folder, is_hub_id

_OPTIONS = ("posterior", "posteriors", "student", "adapter")  # that may be an id
_WRITE_INTO_FOLDER = ("calibrate", "card", "push")


def fetch_hub_ids(command: str, args: Namespace) -> None:
    """Downloads what ids such as owner/name or owner/name@revision stand for.

    Args:
        command: its name.
        args: its options, in which folders of the Hub's cache take the place of ids.

    Raises:
        Refusal: if the command would write into the folder, which is the Hub's.
    """
    for name in _OPTIONS:
        value = args.get(name)
        if isinstance(value, list):
            args[name] = [_local_folder(command, args, path) for path in value]
        elif value is not None:
            args[name] = _local_folder(command, args, value)


def _local_folder(command: str, args: Namespace, given: Path) -> Path:
    """The folder of an id, fetched; any other path as it is given."""
    is_mistyped = given.parent.is_dir()  # the path of a folder that is not there, but its parent is
    if is_mistyped or not is_hub_id(str(given)):
        return given
    records_beside = command == "evaluate" and args.output is None
    if records_beside or command in _WRITE_INTO_FOLDER:
        download = f"download it: hf download {given} --local-dir DIR"
        remedy = "give --output" if records_beside else download
        raise Refusal(
            f"got {given} on the Hub, expected a folder of this machine, into which {command!r} "
            f"writes; {remedy}"
        )
    return artefact_folder(str(given))
