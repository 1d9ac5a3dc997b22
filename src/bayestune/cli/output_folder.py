"""The folder that a run writes to: what `--resume` and `--overwrite` may do there."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

from jsonargparse import Namespace

from bayestune.cli.run_files import (
    UNFINISHED,
    delete_own,
    has_name_of_run,
    has_results,
    holds_run,
    is_occupied,
)
from bayestune.cli.run_settings import Settings, check_same, read_settings, write_settings
from bayestune.errors import Refusal
from bayestune.posteriors import DETAILS
from bayestune.runtime import in_first_process, is_first_process, wait_for_processes

# options that name files or folders to read
INPUTS = ("model", "adapter", "posterior", "data", "evaluation_data", "data_root", "input")
INPUTS += ("unlabelled_data", "anchor", "config", "protocol", "rows", "student", "trained_on")
INPUTS += ("prompt", "unlabelled")


@dataclass(frozen=True)
class OutputFolder:
    """A folder that a run writes to, which may hold an earlier run.

    A new run beside finished results works in `.unfinished` inside the folder. Its files take the
    place of the old ones when it has ended well, so whatever happens before leaves the old ones as
    they are. The folder itself, which may be a link or a mount, is never moved or removed.

    Args:
        folder: of `--output`.
        resume: whether to go on with the run that is there.
        overwrite: whether to replace it.
    """

    folder: Path
    resume: bool = False
    overwrite: bool = False

    @classmethod
    def of(cls, args: Namespace) -> Self:
        """The output of a command, by `--output`, `--resume` and `--overwrite`.

        Raises:
            OSError: if the folder is not empty and neither flag is given, or cannot be written.
            Refusal: if both flags are given, or more than a run would be lost.
        """
        resume = bool(args.get("resume", False))
        overwrite = bool(args.get("overwrite", False))
        output = cls(args.output, resume, overwrite)
        refuse_both(resume, overwrite)
        in_first_process(partial(output._check, args))  # which looks before it writes
        return output

    def _check(self, args: Namespace) -> None:
        """Refuses, before any work, a folder in which the run may not or cannot write."""
        check_writable(self.folder)
        if not is_occupied(self.folder):
            return
        if self.overwrite:
            _refuse_precious(self.folder, args)
        elif not self.resume:
            advice = "choose another --output, or give --overwrite or --resume"
            raise FileExistsError(f"{self.folder} is not empty: {advice}")

    @property
    def unfinished(self) -> Path:
        """Where a new run works while an earlier one's results stand in the folder."""
        return self.folder / UNFINISHED

    @property
    def place(self) -> Path:
        """Where the run that is to be resumed works."""
        return self.unfinished if self.unfinished.is_dir() else self.folder

    def begin(self, settings: Settings | None = None) -> Path:
        """Makes the folder to work in.

        Called when all input is good, by all processes, of which the first one writes.

        Args:
            settings: what the run is started with; None for runs that cannot be resumed.

        Returns:
            The folder to work in, which may be `unfinished`.

        Raises:
            Refusal: with `--resume`, if the run there has other settings.
        """
        return in_first_process(partial(self._begin_here, settings))

    def _begin_here(self, settings: Settings | None) -> Path:
        """What `begin` does, in the first process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.resume:
            place = self.place
            check_same(place, settings or {})
        else:
            delete_own(self.unfinished)
            place = self.unfinished if has_results(self.folder) else self.folder
            if place is self.folder:
                delete_own(self.folder)
            place.mkdir(exist_ok=True)
        if settings and (not self.resume or read_settings(place) is None):
            write_settings(place, settings)
        return place

    def finish(self, place: Path) -> None:
        """Ends a run: files in `.unfinished` take the place of the old ones.

        Args:
            place: what `begin` returned.
        """
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
    """Refuses a folder that cannot be made or written.

    Raises:
        OSError: if what is there is a file, or may not be written.
        Refusal: if it is a link to a folder that is not there.
    """
    if folder.is_symlink() and not folder.exists():
        raise Refusal(f"{folder} is a link to {folder.readlink()}, which is not there; make it")
    nearest = folder  # folder, or what is there of the path to it
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise NotADirectoryError(
            f"{folder} cannot be a folder: {nearest} is a file; choose another --output"
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write to {nearest}; choose another --output")


def inputs_of(args: Namespace) -> Iterator[tuple[str, Path]]:
    """The files and folders that a command reads.

    Args:
        args: its options.

    Returns:
        For each that is there, the option that names it as users type it, and its resolved path.
    """
    for name in INPUTS:
        value = args.get(name)
        for each in value if isinstance(value, list) else [value]:
            path = Path(os.fspath(each)).expanduser() if each else None
            if path is not None and path.exists():
                yield ("rows" if name == "input" else name), path.resolve()


def _refuse_precious(folder: Path, args: Namespace) -> None:
    """Refuses to overwrite in a folder whose loss would be more than that of a run."""
    resolved = folder.resolve()
    advice = "choose another --output"
    for what, path in (("the current folder", Path.cwd()), ("the home folder", Path.home())):
        if path.resolve().is_relative_to(resolved):
            raise Refusal(f"--overwrite: {folder} is {what} or holds it; {advice}")
    for name, path in inputs_of(args):
        if path.is_relative_to(resolved):
            raise Refusal(f"--overwrite: {folder} holds an input, --{name} {path}; {advice}")
    if not holds_run(folder):
        files = [path for path in folder.iterdir() if has_name_of_run(path, with_reports=True)]
        names = sorted(path.name for path in files)
        if names:
            raise Refusal(
                f"--overwrite: {folder} was not written by bayestune, but has files of the same "
                f"names as its own: got {names[:5]}; move them, or {advice}"
            )


def _move_all(source: Path, target: Path) -> None:
    """Moves the content of a folder into another, `posterior.json` last: then all is there."""
    for path in sorted(source.iterdir(), key=lambda path: (path.name == DETAILS, path.name)):
        moved = target / path.name
        if path.is_dir() and moved.is_dir():
            _move_all(path, moved)
            path.rmdir()
        else:
            shutil.move(path, moved)
