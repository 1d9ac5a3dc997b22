"""Options of rows are words: `[yes, no]` is no pair of truth values, as an argument or in YAML."""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

_OPTIONS = re.compile(r"(--(?:\w+\.)*options)(=(.*))?", re.DOTALL)
_NAMES = re.compile(r"(\w+\.)*options")


def spelled_out(arguments: Sequence[str]) -> list[str]:
    """Arguments in which a list after `--options` has its words quoted.

    >>> spelled_out(["fit", "--options", "[yes, no]"])
    ['fit', '--options', '["yes", "no"]']
    """
    spelled = []
    is_value = False
    for argument in map(str, arguments):
        match = _OPTIONS.fullmatch(argument)
        if is_value:
            spelled.append(_quoted(argument))
        elif match and match[2]:
            spelled.append(f"{match[1]}={_quoted(match[3])}")
        else:
            spelled.append(argument)
        is_value = bool(match and not match[2]) and not is_value
    return spelled


def gathered(arguments: Sequence[str], name: str = "--gate") -> list[str]:
    """Arguments in which an option that stands several times is one list at the end.

    >>> gathered(["evaluate", "--gate", "nll<=1", "--gate=ece<=0.1", "--bf16"])
    ['evaluate', '--bf16', '--gate=["nll<=1", "ece<=0.1"]']
    """
    found: list[str] = []
    values: list[str] = []
    follows = False
    for argument in arguments:
        if follows:
            values.append(argument)
        elif argument.startswith(f"{name}="):
            values.append(argument.partition("=")[2])
        elif argument != name:
            found.append(argument)
        follows = argument == name and not follows
    if follows or any(value.startswith("[") for value in values):  # a list already, or cut off
        return list(arguments)
    return [*found, f"{name}={json.dumps(values)}"] if values else found


def _quoted(text: str) -> str:
    """A list of words in JSON; a text that is none as it stands."""
    try:
        words = yaml.load(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError:
        return text
    if isinstance(words, str):
        words = [word.strip() for word in words.split("|" if "|" in words else ",")]
    return json.dumps(words, ensure_ascii=False) if _are_words(words) else text


def _are_words(value: object) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(v, str) for v in value)


def _load(text: str, load: Callable[[str], Any]) -> Any:
    """YAML in which every list called `options` holds words as they are written."""
    value = load(text)
    if "options" not in text:
        return value
    return _with_words(value, yaml.load(text, Loader=yaml.BaseLoader))


def _with_words(value: Any, written: Any) -> Any:
    if not isinstance(value, dict) or not isinstance(written, dict) or len(value) != len(written):
        return value
    found = {}
    for (key, own), told in zip(value.items(), written.values(), strict=True):
        is_options = bool(_NAMES.fullmatch(str(key))) and _are_words(told)
        found[key] = told if is_options else _with_words(own, told)
    return found


def read_options_as_words() -> None:
    """Has jsonargparse read configuration files so; for this process."""
    load = get_loader("yaml")
    if getattr(load, "keeps_words", False):
        return

    def loader(text: str, **_: Any) -> Any:
        return _load(text, load)

    loader.keeps_words = True  # type: ignore[attr-defined]
    set_loader("yaml", loader, exceptions=(yaml.YAMLError,))
