"""Reads and writes `manifest.json`, which lists an export; checks and fills the export's folder."""

import hashlib
import json
import shlex
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bayestune
from bayestune.adapters import CONFIG
from bayestune.errors import Refusal
from bayestune.runtime import follow_umask
from bayestune.sharing.vllm_rules import RANKS, largest_rank, smallest_max_rank

MANIFEST = "manifest.json"
FORMAT = 1
_MADE_BY = "bayestune export"
_OF_SYSTEM = {"lost+found", ".DS_Store", "Thumbs.db"}  # a folder with these alone counts as empty


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What the manifest of an export says; None if the folder has none of ours."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_ours = isinstance(manifest, dict) and manifest.get("made_by") == _MADE_BY
    return manifest if is_ours else None


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes a folder's manifest: facts of the export, and the SHA-256 of each file in it."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            files[path.relative_to(folder).as_posix()] = digest
    head = {"format": FORMAT, "made_by": _MADE_BY, "bayestune": bayestune.__version__}
    text = json.dumps({**head, **facts, "files": files}, indent=1, ensure_ascii=False)
    (folder / MANIFEST).write_text(f"{text}\n", encoding="utf-8")
    follow_umask(folder)


def lora_facts(folder: Path) -> dict[str, Any]:
    """What servers are told of an adapter: rank, alpha and targets, from its configuration."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    targets = config.get("target_modules")
    return {
        "rank": largest_rank(config),
        "alpha": config.get("lora_alpha"),
        "targets": sorted(targets) if isinstance(targets, list) else targets,
    }


def vllm_command(folder: Path) -> str:
    """The command line that serves an export with vLLM.

    Raises:
        Refusal: if the folder is no export.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise Refusal(f"{folder} is no export: got no {MANIFEST} of ours; run `bayestune export`")
    adapters = manifest["adapters"]
    most = smallest_max_rank(manifest["lora"]["rank"]) or RANKS[-1]
    words = ["vllm", "serve", manifest["base_model"] or "BASE", "--enable-lora"]
    words += ["--max-loras", str(len(adapters)), "--max-lora-rank", str(most), "--lora-modules"]
    words += [f"{one['name']}={folder / one['folder']}" for one in adapters]
    return shlex.join(words)


def check_target(folder: Path, overwrite: bool) -> None:
    """Refuses a folder that holds anything, unless an export is to be replaced there."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: expected a folder; choose another --to")
    held = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if not set(held) - _OF_SYSTEM:
        return
    if not overwrite:
        raise FileExistsError(f"{folder} is not empty: choose another --to, or give --overwrite")
    if read_manifest(folder) is None:
        raise Refusal(
            f"--overwrite: got {folder} without a {MANIFEST} of ours, expected an earlier export; "
            "choose another --to"
        )


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Gives a scratch folder; at the end its files replace those of an earlier export in `folder`.

    If the writing fails, nothing has changed. Other files that lie in the folder stay as they are.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as scratch:
            yield Path(scratch)
            _remove_earlier(folder)
            _move_all(Path(scratch), folder)
    finally:
        if made and not any(folder.iterdir()):
            folder.rmdir()


def _remove_earlier(folder: Path) -> None:
    """Removes the files that the manifest of an earlier export names, and folders left empty."""
    earlier = read_manifest(folder)
    if earlier is None:
        return
    (folder / MANIFEST).unlink()
    inside = folder.resolve()
    for name in earlier["files"]:
        path = folder / name
        if path.is_file() and path.resolve().is_relative_to(inside):
            path.unlink()
            if path.parent != folder and not any(path.parent.iterdir()):
                path.parent.rmdir()


def _move_all(scratch: Path, folder: Path) -> None:
    """Moves all files, the manifest last: a folder that has one is whole."""
    files = [path for path in scratch.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: (path.name == MANIFEST, path)):
        to = folder / path.relative_to(scratch)
        to.parent.mkdir(parents=True, exist_ok=True)
        path.replace(to)
