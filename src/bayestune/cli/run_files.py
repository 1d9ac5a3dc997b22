"""The files that runs leave in a folder: whether there are some, and how they alone are deleted.

Runs are known by what their files hold; which files are theirs, by the names that runs give.
"""

import json
import os
import re
import shutil
from pathlib import Path

from bayestune.cli.run_settings import RUN, read_settings
from bayestune.evaluation import RECORDS
from bayestune.methods import METHODS, STARTED
from bayestune.posteriors import DETAILS

UNFINISHED = ".unfinished"  # in a folder with results: where a new run works
CHECKPOINTS = "checkpoints"

_OF_FILE_SYSTEM = {"lost+found", ".DS_Store", "Thumbs.db"}
# names of what runs write
_FILES = re.compile(
    r"adapter_(config|model)\.\w+|posterior\.\w+|(calibration|training|run)\.json"
    r"|records\.jsonl|rows-\d+-.*\.jsonl|\..+\.partial"
)
_REPORT = {"table.md", "summary.png", "report.html"}
_FOLDERS = re.compile(rf"member-\d+|base|{CHECKPOINTS}|\.partial-.*|{'|'.join(METHODS)}")
# names of what fits leave in `checkpoints`, beside those above
_CHECKPOINT = re.compile(
    r"checkpoint-\d+|taught|student|best\.(json|safetensors)|(started|noise_choice)\.json"
)


def is_occupied(folder: Path) -> bool:
    """Whether a folder holds more than a file system and a run without a step put there."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()} - _OF_FILE_SYSTEM
    return bool(names) and not (names <= {RUN, CHECKPOINTS} and _only_settings(folder))


def _only_settings(folder: Path) -> bool:
    """Whether a run has written its settings to a folder, and nothing since."""
    kept = (path for path in (folder / CHECKPOINTS).rglob("*") if path.is_file())
    return read_settings(folder) is not None and all(path.name == STARTED for path in kept)


def holds_run(folder: Path) -> bool:
    """Whether a run has written to a folder, by what its files hold."""
    is_started = read_settings(folder) is not None
    is_unfinished = read_settings(folder / UNFINISHED) is not None
    return is_started or is_unfinished or has_results(folder)


def has_results(folder: Path) -> bool:
    """Whether a folder holds a posterior or records, by what its files hold."""
    # of a posterior the name is enough, so that a damaged one can be fitted anew
    return (folder / DETAILS).is_file() or _first_object_has(folder / RECORDS, "metrics")


def _first_object_has(path: Path, key: str) -> bool:
    """Whether the first object of a JSON file has a key; False of a file that is not JSON."""
    try:
        text = path.read_text(encoding="utf-8")
        first, _ = json.JSONDecoder().raw_decode(text.lstrip())
    except (OSError, ValueError):
        return False
    return isinstance(first, dict) and key in first


def delete_own(folder: Path) -> None:
    """Deletes what bayestune's runs wrote to a folder, and nothing else.

    The folder itself stays, but for an empty `.unfinished`.
    """
    if folder.is_dir() and holds_run(folder):
        _delete_files(folder)
    if folder.name == UNFINISHED and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _delete_files(folder: Path) -> None:
    """Deletes what has a name that runs give, in the folders that have such a name too."""
    with_reports = any((folder / name).is_dir() for name in METHODS)  # only `compare` writes them
    in_checkpoints = CHECKPOINTS in folder.parts[-2:]
    for path in list(folder.iterdir()):
        if not has_name_of_run(path, with_reports):
            if in_checkpoints and _CHECKPOINT.fullmatch(path.name):
                _delete_whole(path)
        elif path.is_dir():
            _delete_files(path)
            if not (path.is_symlink() or os.path.ismount(path) or any(path.iterdir())):
                path.rmdir()
        else:
            path.unlink()


def _delete_whole(path: Path) -> None:
    """Deletes a file, a link, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def has_name_of_run(path: Path, with_reports: bool) -> bool:
    """Whether a file or a folder has a name that runs give; reports have if they are asked for."""
    if path.is_dir():
        return bool(_FOLDERS.fullmatch(path.name))
    return bool(_FILES.fullmatch(path.name)) or (with_reports and path.name in _REPORT)
