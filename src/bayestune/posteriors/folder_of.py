"""Finds a posterior's folder, on this machine or the Hub, and reads its `posterior.json`."""

import json
import re
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from bayestune.adapters import CONFIG, DETAILS, FORMAT
from bayestune.errors import Refusal

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_DOWNLOADED: list[str] = ["*adapter_config.json", "*adapter_model.*", "*posterior.*"]
_DOWNLOADED += ["*calibration.json", "*training.json"]


class PosteriorError(Refusal):
    """A folder is not a posterior that can be loaded on this model."""


def folder_of(path: str | PathLike[str]) -> Path:
    """The folder that holds the adapter: the one given, the only one in it, or the Hub's.

    PEFT writes an adapter that is not called "default" into a folder of its own.

    Args:
        path: a folder; or the id of a repository on the Hub, which is downloaded, "owner/name" or
            "owner/name@revision" with a branch, tag or commit.

    Raises:
        PosteriorError: if several folders in it hold an adapter, or the Hub has no such repository.
    """
    folder = Path(path).expanduser()
    if isinstance(path, str) and is_hub_id(path):
        folder = _downloaded(path)
    if (folder / CONFIG).is_file() or (folder / DETAILS).is_file() or not folder.is_dir():
        return folder
    inner = sorted(child for child in folder.iterdir() if (child / CONFIG).is_file())
    if not inner:
        return folder
    if len(inner) > 1 or inner[0].name.startswith("checkpoint-"):
        raise PosteriorError(
            f"{folder} is not a posterior: got a folder of the adapters "
            f"{[child.name for child in inner]}, expected one; give its own folder"
        )
    return inner[0]


def is_hub_id(path: str) -> bool:
    """Whether a path has the form of a Hub id and no such folder is here."""
    return not Path(path).expanduser().exists() and bool(_HUB_ID.fullmatch(path))


def _downloaded(name: str) -> Path:
    repository, _, revision = name.partition("@")
    try:
        return Path(
            snapshot_download(repository, revision=revision or None, allow_patterns=_DOWNLOADED)
        )
    except Exception as error:  # the client's transport errors share no public base class
        raise PosteriorError(
            f"{name} is not a posterior: got no such folder, and no such repository on the Hub or "
            f"in its cache ({type(error).__name__}), expected a folder or a Hub id; check the name"
        ) from error


def read_details(folder: str | PathLike[str]) -> dict[str, Any]:
    """What `posterior.json` says.

    Args:
        folder: a posterior's folder or Hub id, see `folder_of`.

    Raises:
        PosteriorError: if it is not there, cut off, or of a later format.
    """
    folder = folder_of(folder)
    path = folder / DETAILS
    if not path.is_file():
        got = "no adapter"
        advice = "look at the path"
        if (folder / CONFIG).is_file():
            got = "a plain LoRA adapter"
            advice = "run `bayestune calibrate` on it first, which keeps how rows are put to it"
        raise PosteriorError(
            f"{folder} is not a posterior: got {got} without {DETAILS}, expected a folder of "
            f"`fit`; {advice}"
        )
    try:
        details = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        message = f"{path} is damaged or cut off ({error}); restore it or fit again"
        raise PosteriorError(message) from None
    if details.get("format") != FORMAT:
        raise PosteriorError(
            f"{path} has format {details.get('format')}, expected {FORMAT}: it was written by "
            f"bayestune {details.get('bayestune')}; upgrade bayestune"
        )
    return details
