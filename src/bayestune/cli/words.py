"""Words as they are written: `[yes, no]` is no pair of truth values, `a=b,c=d` says what is what.

Options of rows are words, as an argument or in YAML.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

_OPTIONS = re.compile(r"(--(?:\w+\.)*options)(=(.*))?", re.DOTALL)
_COLUMNS = re.compile(r"(--(?:\w+\.)*columns)(=(.*))?", re.DOTALL)
_NAMES = re.compile(r"(\w+\.)*options")
_FIRST_WORD_AND_ROWS = {  # the options that a command's first word and `--rows` stand for
    "evaluate": ("--posterior", "--evaluation_data"),
    "predict": ("--posterior", "--input"),
    "generate": ("--posterior", "--input"),
    "lm-eval": ("--posterior", None),
    "bench": ("--config", None),
}


def spelled_out(arguments: Sequence[str]) -> list[str]:
    """Arguments in which a list after `--options` has its words quoted, and pairs are JSON.

    >>> spelled_out(["fit", "--options", "[yes, no]"])
    ['fit', '--options', '["yes", "no"]']
    >>> spelled_out(["--columns=question=subject,answer=queue"])
    ['--columns={"question": "subject", "answer": "queue"}']
    """
    spelled = []
    write: Callable[[str], str] | None = None  # how the value of the option before is written
    for argument in map(str, arguments):
        named = _with_words_of(argument) if write is None else None
        if write is not None:
            spelled.append(write(argument))
            write = None
        elif named is None:
            spelled.append(argument)
        else:
            match, spell = named
            spelled.append(f"{match[1]}={spell(match[3])}" if match[2] else argument)
            write = None if match[2] else spell
    return spelled


def _with_words_of(argument: str) -> tuple[re.Match[str], Callable[[str], str]] | None:
    """The parts of an option whose value is written in words, and how to write that."""
    for pattern, spell in ((_OPTIONS, _quoted), (_COLUMNS, _paired)):
        if match := pattern.fullmatch(argument):
            return match, spell
    return None


def _paired(text: str) -> str:
    """Pairs such as `question=subject,answer=queue` in JSON; a text that is none as it stands."""
    if text.lstrip().startswith("{"):
        return text
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(name.strip() and sign for name, sign, _ in pairs):
        return text
    names = [name.strip() for name, _, _ in pairs]
    if len(set(names)) < len(names):
        return text
    found = {name.strip(): value.strip() for name, _, value in pairs}
    return json.dumps(found, ensure_ascii=False)


def addressed(arguments: Sequence[str]) -> list[str]:
    """Arguments in which every command takes a folder first and its rows by `--rows`.

    The folder's and the rows' own options stay what they are, so that files of options do too.

    >>> addressed(["predict", "runs/tickets", "--rows", "new.jsonl"])
    ['predict', '--posterior', 'runs/tickets', '--input', 'new.jsonl']
    """
    found = list(arguments)
    if not found or found[0] not in _FIRST_WORD_AND_ROWS:
        return found
    first, rows = _FIRST_WORD_AND_ROWS[found[0]]
    if len(found) > 1 and not found[1].startswith("-"):
        found.insert(1, first)
    for place, argument in enumerate(found):
        name, sign, value = argument.partition("=")
        if name == "--rows" and rows:
            found[place] = f"{rows}{sign}{value}"
    return found


def as_typed(command: str, name: str) -> str:
    """How a user types what a command needs: the folder in capitals, the rows by `--rows`.

    >>> [as_typed("predict", name) for name in ("posterior", "input", "output")]
    ['POSTERIOR', '--rows', '--output']
    """
    first, rows = _FIRST_WORD_AND_ROWS.get(command, (None, None))
    option = f"--{name}"
    if option == first:
        return name.upper()
    return "--rows" if option == rows else option


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
    for (key, own), as_written in zip(value.items(), written.values(), strict=True):
        is_options = bool(_NAMES.fullmatch(str(key))) and _are_words(as_written)
        found[key] = as_written if is_options else _with_words(own, as_written)
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
