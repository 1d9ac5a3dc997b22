"""Pages of the reference that the package makes: its commands with their options, its names."""

import importlib
import inspect
import pkgutil
import re
from argparse import SUPPRESS, Action
from functools import cache
from typing import Any

import bayestune
from bayestune.cli.parser import make_parser
from bayestune.cli.start import COMMANDS
from bayestune.methods import METHODS

COMMANDS_PAGE = "reference/commands.md"
NAMES_PAGE = "reference/index.md"
OF_METHODS = "Options of the methods"
_NO_ROOM = {"__main__", "cli"}  # the commands have a page of their own


@cache
def subparsers() -> dict[str, Any]:
    """The parser of each command, with the options of all methods."""
    for action in make_parser()._actions:
        if isinstance(action.choices, dict):
            return {name: action.choices[name] for name in COMMANDS}
    raise RuntimeError("bayestune's parser has no commands")


@cache
def rooms() -> dict[str, tuple[str, ...]]:
    """The rooms of the package and the public names of each, in alphabetical order."""
    top: dict[str, list[str]] = {}
    for name, room in bayestune._HOMES.items():
        top.setdefault(room, []).append(name)
    found = {}
    for _, room, _ in pkgutil.iter_modules(bayestune.__path__):
        if room not in _NO_ROOM:
            module = importlib.import_module(f"bayestune.{room}")
            names = getattr(module, "__all__", None) or top.get(room, ())
            found[room] = tuple(names)
    return {room: names for room, names in found.items() if names}


# Names


def names_page() -> str:
    """The names of `bayestune` itself, a line each, and the rooms."""
    lines = ["# Reference", "", "What `import bayestune` offers, by the room that it lives in:", ""]
    lines += ["| name | is |", "|---|---|"]
    for name, room in sorted(bayestune._HOMES.items(), key=lambda pair: pair[0].lower()):
        about = _first_line(getattr(bayestune, name), name)
        lines.append(f"| [`{name}`]({room}.md#{_anchor(room, name)}) | {about} |")
    lines += ["", "## The rooms", ""]
    lines += ["Every package has public names of its own, for those who build on it.", ""]
    lines += ["| room | is for |", "|---|---|"]
    for room in rooms():
        about = _cell(_summary(importlib.import_module(f"bayestune.{room}")))
        lines.append(f"| [`bayestune.{room}`]({room}.md) | {about} |")
    lines += [
        "",
        "[The commands](commands.md) with all their options stand on a page of their own,",
    ]
    lines += ["and so do [the files](../formats.md) that a fit, a calibration and a study leave."]
    return "\n".join(lines) + "\n"


def room_pages() -> dict[str, str]:
    """A page for each room with the documentation of its public names."""
    pages = {}
    for room, names in rooms().items():
        about = inspect.getdoc(importlib.import_module(f"bayestune.{room}")) or ""
        lines = [f"# bayestune.{room}", "", about, ""]
        lines += [f"::: {_anchor(room, name)}\n" for name in names]
        pages[f"reference/{room}.md"] = "\n".join(lines)
    return pages


def _anchor(room: str, name: str) -> str:
    """The dotted name that a public name is documented under.

    `bayestune.methods` takes names from the table of methods, which reading its source cannot
    follow: these are documented where they are defined.
    """
    if name == "METHODS":
        return f"bayestune.{room}.registry.METHODS"
    value = getattr(importlib.import_module(f"bayestune.{room}"), name)
    home = getattr(value, "__module__", "") if room == "methods" else ""
    return f"{home if home.startswith('bayestune') else f'bayestune.{room}'}.{name}"


def _first_line(value: Any, name: str) -> str:
    if name == "METHODS":
        return "The methods by the names that the commands know them by."
    return _cell(_summary(value))


def _summary(value: Any) -> str:
    """The first paragraph of a docstring."""
    return (inspect.getdoc(value) or "").split("\n\n")[0].replace("\n", " ")


def _cell(text: str) -> str:
    """A text as a cell of a table."""
    text = re.sub(r"(?<![`\w])(\w*_\w*|\w+\*\w*)(?![`\w])", r"`\1`", text)
    return text.replace("|", "\\|").replace("<", "&lt;")


# Commands


def commands_page() -> str:
    """Every command with its options, and those of the methods once."""
    lines = ["# Commands", "", "Made from the parser. Every command also takes `--print_config`,"]
    lines += [
        "which prints its options as a file for `--config`, and `--help`. A switch stands for"
    ]
    lines += ["`true`: `--resume` is `--resume true`. Lists are written `[a,b]`.", ""]
    shared: dict[str, Any] = {}
    for name, parser in subparsers().items():
        lines += [f"## bayestune {name}", "", COMMANDS[name], ""]
        for group in parser._action_groups:
            actions = [action for action in group._group_actions if _is_shown(action)]
            method = _method_of(actions)
            if method:
                shared.setdefault(method, (group.title, actions))
            elif actions:
                lines += [*_heading(group.title), *_table(actions), ""]
        if any(_method_of(group._group_actions) for group in parser._action_groups):
            lines += [
                f"And [the methods' own options](#{OF_METHODS.lower().replace(' ', '-')}).",
                "",
            ]
    lines += [f"## {OF_METHODS}", "", "Of `fit` and `compare`; `bench` has them in its file.", ""]
    for method in METHODS:
        if method in shared:
            title, actions = shared[method]
            lines += [f"### {method}", "", _cell(title or ""), "", *_table(actions), ""]
    return "\n".join(lines)


def _is_shown(action: Action) -> bool:
    kept_aside = {"help", "print_config", "config"}
    return action.help != SUPPRESS and action.dest.split(".")[-1] not in kept_aside | {*METHODS}


def _method_of(actions: list[Action]) -> str | None:
    """The method whose options these are."""
    first = {action.dest.split(".")[0] for action in actions if action.dest != "help"}
    only = first.pop() if len(first) == 1 else ""
    return only if only in METHODS else None


def _heading(title: str | None) -> list[str]:
    plain = {"options": "", "positional arguments": ""}
    title = plain.get(title or "", title or "")
    return [f"*{title.rstrip(':')}*", ""] if title else []


def _table(actions: list[Action]) -> list[str]:
    lines = ["| option | is | default |", "|---|---|---|"]
    for action in actions:
        name = action.option_strings[-1] if action.option_strings else action.dest
        about = _cell(" ".join((action.help or "").split()).rstrip("."))
        default = "needed" if _is_needed(action) else _default(action.default)
        lines.append(f"| `{name}` {_values(action)} | {about} | {default} |")
    return lines


def _is_needed(action: Action) -> bool:
    return action.required or not action.option_strings


def _default(value: Any) -> str:
    if value is None or value == SUPPRESS:
        return ""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f"`{text}`" if text else '``""``'


def _values(action: Action) -> str:
    """What an option takes, in a few words."""
    kind = getattr(action, "_typehint", None) or action.type
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", str(kind)) if kind else ""
    text = re.sub(r"(?:\w+\.)+(\w+)", r"\1", text)
    choices = re.search(r"Literal\[(.*?)\]", text)
    if choices:
        text = choices[1].replace("'", "").replace(", ", " \\| ")
    words = {"int": "number", "float": "number", "str": "text", "Path": "path", "bool": "switch"}
    plain = re.sub(r"Optional\[(.*)\]$|(?: \| None)", r"\1", text)
    return f"<small>{_escaped(words.get(plain, plain))}</small>" if plain else ""


def _escaped(text: str) -> str:
    return (
        text.replace("<", "&lt;").replace("[", "&#91;").replace("_", "\\_").replace(" | ", " \\| ")
    )
