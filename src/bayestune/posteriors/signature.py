"""The digest of an artefact: what a calibration is bound to."""

import hashlib
from os import PathLike
from pathlib import Path

from bayestune.adapters import CONFIG, DETAILS, TENSORS, WEIGHTS
from bayestune.errors import Refusal
from bayestune.posteriors.folder_of import folder_of, read_details

_FILES = (CONFIG, *WEIGHTS, TENSORS, DETAILS)


def artefact_folder(folder: str | PathLike[str]) -> Path:
    """The folder that holds the files of a posterior or of a plain adapter.

    Raises:
        Refusal: if there is neither in it.
    """
    place = folder_of(folder)
    if not ((place / DETAILS).is_file() or (place / CONFIG).is_file()):
        raise Refusal(
            f"{place} is not a posterior: got no adapter, neither {DETAILS} nor {CONFIG}, expected "
            "a folder of `fit` or a LoRA adapter as PEFT saves it; look at the path"
        )
    return place


def posterior_digest(folder: str | PathLike[str]) -> str:
    """SHA-256 of all that predictions of a posterior or a plain LoRA adapter depend on.

    It covers the adapter's configuration and weights, `posterior.safetensors` and `posterior.json`,
    and those of its members: not the folder's name, and nothing else that lies in it.

    Args:
        folder: of `fit`, or an adapter's as PEFT saves it.

    Raises:
        Refusal: if it is neither.
    """
    place = artefact_folder(folder)
    whole = hashlib.sha256()
    for name in _FILES:
        path = place / name
        if path.is_file():
            with path.open("rb") as file:
                whole.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    for name in _inner(place):
        whole.update(f"{name}/ {posterior_digest(place / name)}\n".encode())
    return whole.hexdigest()


def _inner(place: Path) -> list[str]:
    """The folders of a mixture's members, and of what a temperature is around."""
    if not (place / DETAILS).is_file():
        return []
    details = read_details(place)
    return [*details.get("members", ()), *([details["base"]] if "base" in details else [])]
