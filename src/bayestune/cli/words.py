"""Rewrites arguments before they are parsed, so that jsonargparse takes them as they are meant.

The options of rows stay words, here and in YAML, where `[yes, no]` would be two truth values. Pairs
such as `a=b,c=d` become JSON; a folder and `--rows`, the options they stand for; an option that
stands several times, a list. `arguments` are throughout what was typed after `bayestune`.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

_OPTIONS = re.compile(r"(--(?:\w+\.)*options)(=(.*))?", re.DOTALL)
_COLUMNS = re.compile(r"(--(?:\w+\.)*columns)(=(.*))?", re.DOTALL)
_OPTIONS_KEY = re.compile(r"(\w+\.)*options")  # in YAML
_FIRST_WORD_AND_ROWS = {  # the options that a command's first word and `--rows` stand for
    "evaluate": ("--posterior", "--evaluation_data"),
    "predict": ("--posterior", "--input"),
    "generate": ("--posterior", "--input"),
    "lm-eval": ("--posterior", None),
    "bench": ("--config", None),
}


def words_as_json(arguments: Sequence[str]) -> list[str]:
    """Arguments with the words after `--options` and the pairs after `--columns` as JSON.

    >>> words_as_json(["fit", "--options", "[yes, no]"])
    ['fit', '--options', '["yes", "no"]']
    >>> words_as_json(["--columns=question=subject,answer=queue"])
    ['--columns={"question": "subject", "answer": "queue"}']
    """
    rewritten = []
    value_as_json: Callable[[str], str] | None = None  # of an option that has just been named
    for argument in map(str, arguments):
        if value_as_json is not None:
            rewritten.append(value_as_json(argument))
            value_as_json = None
            continue
        option = _option_of_words(argument)
        if option is None:
            rewritten.append(argument)
            continue
        match, as_json = option
        if match[2]:  # its value stands behind "="
            rewritten.append(f"{match[1]}={as_json(match[3])}")
        else:
            rewritten.append(argument)
            value_as_json = as_json
    return rewritten


def _option_of_words(argument: str) -> tuple[re.Match[str], Callable[[str], str]] | None:
    """The parts of an option whose value is of words, and what makes JSON of it; else None."""
    for pattern, as_json in ((_OPTIONS, _list_as_json), (_COLUMNS, _pairs_as_json)):
        if match := pattern.fullmatch(argument):
            return match, as_json
    return None


def _list_as_json(text: str) -> str:
    """A list of words as JSON; another text as it stands."""
    try:
        words = yaml.load(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError:
        return text
    if isinstance(words, str):
        words = [word.strip() for word in words.split("|" if "|" in words else ",")]
    return json.dumps(words, ensure_ascii=False) if _are_words(words) else text


def _pairs_as_json(text: str) -> str:
    """Pairs such as `question=subject,answer=queue` as JSON; another text as it stands."""
    if text.lstrip().startswith("{"):
        return text
    pairs = [pair.partition("=") for pair in text.split(",")]
    if not all(name.strip() and sign for name, sign, _ in pairs):
        return text
    names = [name.strip() for name, _, _ in pairs]
    if len(set(names)) < len(names):
        return text
    by_name = {name.strip(): value.strip() for name, _, value in pairs}
    return json.dumps(by_name, ensure_ascii=False)


def with_option_names(arguments: Sequence[str]) -> list[str]:
    """Arguments with the options that a command's first word and `--rows` stand for.

    The options keep their names, such as `--input`, because files of options have them.

    >>> with_option_names(["predict", "runs/tickets", "--rows", "new.jsonl"])
    ['predict', '--posterior', 'runs/tickets', '--input', 'new.jsonl']
    """
    named = list(arguments)
    if not named or named[0] not in _FIRST_WORD_AND_ROWS:
        return named
    first_word, rows = _FIRST_WORD_AND_ROWS[named[0]]
    if len(named) > 1 and not named[1].startswith("-"):
        named.insert(1, first_word)
    for place, argument in enumerate(named):
        name, sign, value = argument.partition("=")
        if name == "--rows" and rows:
            named[place] = f"{rows}{sign}{value}"
    return named


def as_typed(command: str, name: str) -> str:
    """How a user types an option: the folder in capitals, the rows by `--rows`.

    Args:
        command: its name.
        name: of the option, without the dashes.

    >>> [as_typed("predict", name) for name in ("posterior", "input", "output")]
    ['POSTERIOR', '--rows', '--output']
    """
    first_word, rows = _FIRST_WORD_AND_ROWS.get(command, (None, None))
    option = f"--{name}"
    if option == first_word:
        return name.upper()
    return "--rows" if option == rows else option


def repeats_as_list(arguments: Sequence[str], name: str = "--gate") -> list[str]:
    """Arguments in which an option that may stand several times stands once, at the end, as a list.

    Args:
        arguments: as they are typed.
        name: of the option.

    >>> repeats_as_list(["evaluate", "--gate", "nll<=1", "--gate=ece<=0.1", "--bf16"])
    ['evaluate', '--bf16', '--gate=["nll<=1", "ece<=0.1"]']
    """
    others: list[str] = []
    values: list[str] = []
    is_value = False  # whether the argument is the value of the option before it
    for argument in arguments:
        if is_value:
            values.append(argument)
        elif argument.startswith(f"{name}="):
            values.append(argument.partition("=")[2])
        elif argument != name:
            others.append(argument)
        is_value = argument == name and not is_value
    lacks_value = is_value
    if lacks_value or any(value.startswith("[") for value in values):  # or is a list already
        return list(arguments)
    return [*others, f"{name}={json.dumps(values)}"] if values else others


def read_options_as_words() -> None:
    """Has jsonargparse take words as words in files of options, from now on in this process."""
    load = get_loader("yaml")
    if getattr(load, "keeps_words", False):
        return

    def loader(text: str, **_: Any) -> Any:
        return _load(text, load)

    loader.keeps_words = True  # type: ignore[attr-defined]
    set_loader("yaml", loader, exceptions=(yaml.YAMLError,))


def _load(text: str, load: Callable[[str], Any]) -> Any:
    """What `load` makes of YAML, but with every list called `options` as it is written."""
    value = load(text)
    if "options" not in text:
        return value
    as_written = yaml.load(text, Loader=yaml.BaseLoader)
    return _with_words(value, as_written)


def _with_words(value: Any, as_written: Any) -> Any:
    """The value, with lists called `options` taken from `as_written`, where all are texts."""
    if not isinstance(value, dict) or not isinstance(as_written, dict):
        return value
    if len(value) != len(as_written):
        return value
    mixed = {}
    for (key, parsed), written in zip(value.items(), as_written.values(), strict=True):
        is_options = bool(_OPTIONS_KEY.fullmatch(str(key))) and _are_words(written)
        mixed[key] = written if is_options else _with_words(parsed, written)
    return mixed


def _are_words(value: object) -> bool:
    """Whether a value is a list of two texts or more."""
    if not isinstance(value, list) or len(value) < 2:
        return False
    return all(isinstance(word, str) for word in value)
