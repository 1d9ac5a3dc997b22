"""The folder that a run writes to: which of its files are ours, and what `--overwrite` may do."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from jsonargparse import Namespace

from bayestune.cli.run_settings import RUN, check_same, read_settings, write_settings
from bayestune.errors import Refusal
from bayestune.evaluation import RECORDS
from bayestune.methods import METHODS, STARTED
from bayestune.posteriors import DETAILS
from bayestune.runtime import in_first_process, is_first_process, wait_for_processes

UNFINISHED = ".unfinished"
CHECKPOINTS = "checkpoints"
INPUTS = ("model", "adapter", "posterior", "data", "evaluation_data", "data_root", "input")
INPUTS += ("unlabelled_data", "anchor", "config", "protocol", "rows", "student", "trained_on")
INPUTS += ("prompt", "unlabelled")

_OF_SYSTEM = {"lost+found", ".DS_Store", "Thumbs.db"}
_FILES = re.compile(
    r"adapter_(config|model)\.\w+|posterior\.\w+|(calibration|training|run)\.json"
    r"|records\.jsonl|rows-\d+-.*\.jsonl|\..+\.partial"
)
_REPORT = {"table.md", "summary.png", "report.html"}
_FOLDERS = re.compile(rf"member-\d+|base|{CHECKPOINTS}|\.partial-.*|{'|'.join(METHODS)}")
# what fits leave in `checkpoints` beside what has such names too
_CHECKPOINT = re.compile(
    r"checkpoint-\d+|taught|student|best\.(json|safetensors)|(started|noise_choice)\.json"
)


@dataclass(frozen=True)
class OutputFolder:
    """A folder that a run writes to, which may hold an earlier run.

    A new run beside finished results works in `.unfinished` inside the folder. Its files take the
    place of the old ones when it has ended well, so whatever happens before leaves the old ones as
    they are. The folder itself, which may be a link or a mount, is never moved or removed.
    """

    folder: Path
    resume: bool = False
    overwrite: bool = False

    @classmethod
    def of(cls, options: Namespace) -> Self:
        """The output of a command; refused before any work if the run may not or cannot write."""
        flags = {name: bool(options.get(name, False)) for name in ("resume", "overwrite")}
        output = cls(options.output, **flags)
        refuse_both(**flags)
        in_first_process(partial(output._check, options))  # which looks before it writes
        return output

    def _check(self, options: Namespace) -> None:
        check_writable(self.folder)
        if self.occupied and not (self.overwrite or self.resume):
            advice = "choose another --output, or give --overwrite or --resume"
            raise FileExistsError(f"{self.folder} is not empty: {advice}")
        if self.occupied and self.overwrite:
            _refuse_precious(self.folder, options)

    @property
    def occupied(self) -> bool:
        """Whether the folder holds more than a file system and a run without a step put there."""
        folder = self.folder
        if not folder.is_dir():
            return False
        names = {path.name for path in folder.iterdir()} - _OF_SYSTEM
        return bool(names) and not (names <= {RUN, CHECKPOINTS} and _only_settings(folder))

    @property
    def unfinished(self) -> Path:
        """Where a new run works while an earlier one's results stand in the folder."""
        return self.folder / UNFINISHED

    @property
    def place(self) -> Path:
        """Where the run that is to be resumed works."""
        return self.unfinished if self.unfinished.is_dir() else self.folder

    def begin(self, settings: dict[str, Any] | None = None) -> Path:
        """The folder to work in, made; called when all input is good, by all processes.

        Raises:
            Refusal: with `--resume`, if the run there has other settings.
        """
        return in_first_process(partial(self._begun, settings))

    def _begun(self, settings: dict[str, Any] | None) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.resume:
            place = self.place
            check_same(place, settings or {})
        else:
            delete_own(self.unfinished)
            place = self.unfinished if _has_results(self.folder) else self.folder
            if place is self.folder:
                delete_own(self.folder)
            place.mkdir(exist_ok=True)
        if settings and (not self.resume or read_settings(place) is None):
            write_settings(place, settings)
        return place

    def finish(self, place: Path) -> None:
        """Puts the files of a run that worked in `.unfinished` in the place of the old ones."""
        wait_for_processes()
        if place != self.folder and is_first_process():
            delete_own(self.folder)
            _move_all(place, self.folder)
            place.rmdir()


def refuse_both(resume: bool, overwrite: bool) -> None:
    """Refuses `--overwrite` together with `--resume`."""
    if resume and overwrite:
        raise Refusal(
            "got both --overwrite and --resume, expected one: --resume goes on with the run that "
            "is there, --overwrite begins anew"
        )


def check_writable(folder: Path) -> None:
    """Refuses a folder that cannot be made or written, by its own name."""
    if folder.is_symlink() and not folder.exists():
        raise Refusal(f"{folder} is a link to {folder.readlink()}, which is not there; make it")
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise NotADirectoryError(
            f"{folder} cannot be a folder: {there} is a file; choose another --output"
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write to {there}; choose another --output")


def inputs_of(options: Namespace) -> Iterator[tuple[str, Path]]:
    """The files and folders that a command reads, each with the option that names it."""
    for name in INPUTS:
        given = options.get(name)
        for value in given if isinstance(given, list) else [given]:
            path = Path(os.fspath(value)).expanduser() if value else None
            if path is not None and path.exists():
                yield ("rows" if name == "input" else name), path.resolve()


def _refuse_precious(folder: Path, options: Namespace) -> None:
    """Refuses to overwrite in a folder whose loss would be more than that of a run."""
    here = folder.resolve()
    advice = "choose another --output"
    for what, path in (("the current folder", Path.cwd()), ("the home folder", Path.home())):
        if path.resolve().is_relative_to(here):
            raise Refusal(f"--overwrite: {folder} is {what} or holds it; {advice}")
    for name, path in inputs_of(options):
        if path.is_relative_to(here):
            raise Refusal(f"--overwrite: {folder} holds an input, --{name} {path}; {advice}")
    if not _is_ours(folder):
        names = sorted(path.name for path in folder.iterdir() if _named_as_ours(path, True))
        if names:
            raise Refusal(
                f"--overwrite: {folder} was not written by bayestune, but has files of the same "
                f"names as its own: got {names[:5]}; move them, or {advice}"
            )


def _only_settings(folder: Path) -> bool:
    """Whether a run of ours has noted its settings in a folder, and kept nothing since."""
    kept = (path for path in (folder / CHECKPOINTS).rglob("*") if path.is_file())
    return read_settings(folder) is not None and all(path.name == STARTED for path in kept)


def _is_ours(folder: Path) -> bool:
    """Whether a run of ours has written to a folder, by what its files hold."""
    return _has_results(folder) or read_settings(folder) is not None or _unfinished(folder)


def _unfinished(folder: Path) -> bool:
    return read_settings(folder / UNFINISHED) is not None


def _has_results(folder: Path) -> bool:
    # of a posterior the name alone says it, so that a damaged one can be fitted anew
    return (folder / DETAILS).is_file() or _holds(folder / RECORDS, "metrics")


def _holds(path: Path, key: str) -> bool:
    """Whether the first object of a JSON file has a key; a file that is no JSON has not."""
    try:
        text = path.read_text(encoding="utf-8")
        first, _ = json.JSONDecoder().raw_decode(text.lstrip())
    except (OSError, ValueError):
        return False
    return isinstance(first, dict) and key in first


def _named_as_ours(path: Path, reports: bool) -> bool:
    if path.is_dir():
        return bool(_FOLDERS.fullmatch(path.name))
    return bool(_FILES.fullmatch(path.name)) or (reports and path.name in _REPORT)


def delete_own(folder: Path) -> None:
    """Deletes what runs of ours wrote to a folder, and nothing else; the folder itself stays."""
    if folder.is_dir() and _is_ours(folder):
        _delete(folder)
    if folder.name == UNFINISHED and folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _delete(folder: Path) -> None:
    reports = any((folder / name).is_dir() for name in METHODS)  # only `compare` writes them
    for path in list(folder.iterdir()):
        if not _named_as_ours(path, reports):
            whole = folder.parts[-2:].count(CHECKPOINTS) and _CHECKPOINT.fullmatch(path.name)
            if whole and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif whole:
                path.unlink()
        elif path.is_dir():
            _delete(path)
            if not (path.is_symlink() or os.path.ismount(path) or any(path.iterdir())):
                path.rmdir()
        else:
            path.unlink()


def _move_all(source: Path, target: Path) -> None:
    """Moves the content of a folder into another, `posterior.json` last."""
    for path in sorted(source.iterdir(), key=lambda path: (path.name == DETAILS, path.name)):
        to = target / path.name
        if path.is_dir() and to.is_dir():
            _move_all(path, to)
            path.rmdir()
        else:
            shutil.move(path, to)
