"""Keys of cells and fits: a readable name, and a hash of everything that determines the result.

A field that was added to a settings class later says what its absence meant before, as in
`metadata={"absent_means": False}`. At that value keys leave it out, so that earlier keys stay
valid. A field with `metadata={"changes_result": False}` is in no key.
"""

import re
from collections.abc import Mapping
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any

from bayestune.data import digest as full_digest
from bayestune.methods import METHODS, Method, described
from bayestune.session import name_in_records

# To be raised when the same settings begin to give other numbers, so that a grid starts its cells
# anew instead of mixing them. Left out of keys while it is 1.
ARITHMETIC = 1


def lasting(settings: Any) -> dict[str, Any]:
    """The fields of a settings object that determine the result, nested ones too."""
    kept = {}
    for field in fields(settings):
        value = getattr(settings, field.name)
        if _counts(field, value):
            kept[field.name] = lasting(value) if is_dataclass(value) else value
    return kept


def _counts(field: Field[Any], value: object) -> bool:
    """Whether a field with this value is part of keys."""
    if not field.metadata.get("changes_result", True):
        return False
    return "absent_means" not in field.metadata or value != field.metadata["absent_means"]


def lasting_method(method: Method) -> dict[str, Any]:
    """A method as `described`, without the fields that keys leave out; its base likewise."""
    return _lasting_settings(described(method))


def _lasting_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    kept = dict(settings)
    for field in fields(METHODS[settings["method"]]):
        if field.name in kept and not _counts(field, kept[field.name]):
            del kept[field.name]
    if "base" in kept:
        kept["base"] = _lasting_settings(kept["base"])
    return kept


def model_facts(model: str | None) -> list[Any]:
    """What tells a model from others: its name; of a directory, configuration and file sizes."""
    facts: list[Any] = [name_in_records(model) if model else None]
    folder = Path(model or "")
    if model and folder.is_dir():
        weights = sorted(folder.glob("*.safetensors"))
        facts += [(file.name, file.stat().st_size) for file in weights]
        config = folder / "config.json"
        if config.is_file():
            facts.append(config.read_text(encoding="utf-8"))
    return facts


def digest(*parts: Any) -> str:
    """A short hash of dataclasses and what JSON can hold."""
    arithmetic = () if ARITHMETIC == 1 else (ARITHMETIC,)
    return full_digest(*parts, *arithmetic, default=_jsonable)[:10]


def _jsonable(value: Any) -> Any:
    return lasting(value) if is_dataclass(value) else str(value)


def slug(name: str) -> str:
    """A name in letters and digits, for files.

    >>> slug("TFB on MAP")
    'tfb-on-map'
    """
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def readable_part(key: str) -> str:
    """The part of a key that names model, task, method and seed, without the hash of settings."""
    return key.rpartition("--")[0]
