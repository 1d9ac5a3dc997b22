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

    Args:
        folder: it, the folder around it, or a Hub id; see `read_details`.

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
    """SHA-256 of the files that predictions of a posterior or a plain LoRA adapter depend on.

    These are the adapter's configuration and weights, `posterior.safetensors`, `posterior.json`,
    and those of a mixture's members. The folder's name and its other files do not matter.

    Args:
        folder: of `fit`, or an adapter's as PEFT saves it.

    Raises:
        Refusal: if it is neither.
    """
    place = artefact_folder(folder)
    digest = hashlib.sha256()
    for name in _FILES:
        path = place / name
        if path.is_file():
            with path.open("rb") as file:
                of_file = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{name} {of_file}\n".encode())
    for name in _inner(place):
        digest.update(f"{name}/ {posterior_digest(place / name)}\n".encode())
    return digest.hexdigest()


def _inner(place: Path) -> list[str]:
    """The folders of a mixture's members, and of the base of a tempered posterior."""
    if not (place / DETAILS).is_file():
        return []
    details = read_details(place)
    names = list(details.get("members", ()))
    if "base" in details:
        names.append(details["base"])
    return names
