"""What does not parse, in a line that names the nearest option; and help for what was asked."""

import re
from argparse import Action
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser

from bayestune.cli.words import as_typed
from bayestune.errors import nearest
from bayestune.methods import METHODS

_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "tuple": "a list such as [a,b]",
    "list": "a list such as [a,b]",
    "dict": "settings such as {name: value}",
    "NoneType": "null",
}
_UNKNOWN = re.compile(r"unrecognized arguments: (?P<given>.*)", re.DOTALL)
_NOT_ACCEPTED = re.compile(r"Subcommand '.*' does not accept option '(?P<name>[^']*)'")
_MISSING = re.compile(r"the following arguments are required: (?P<names>.*)", re.DOTALL)
_BAD_VALUE = re.compile(r'Parser key "(?P<name>[^"]*)":\s*(?P<why>.*)', re.DOTALL)
_GOT = re.compile(r"(?:Got|Given) value: (?P<value>.*)", re.DOTALL)


def one_line(message: str, parser: ArgumentParser) -> str:
    """The parser's message in a line, with a remedy."""
    name = parser.prog.replace(" [options]", "")
    if found := _UNKNOWN.fullmatch(message):
        given = found["given"].split()
        unknown = next((text for text in given if text.startswith("-")), given[0])
        said = _no_option(unknown.partition("=")[0], parser)
    elif found := _NOT_ACCEPTED.fullmatch(message):
        said = _no_option(f"--{found['name']}", parser)
    elif found := _MISSING.fullmatch(message):
        command, names = _missing(found["names"], parser)
        name = f"bayestune {command}"
        said = f"{name} needs {names}"
    elif found := _BAD_VALUE.fullmatch(message):
        said = _bad_value(found["name"], found["why"])
    else:
        said = " ".join(message.removeprefix("argument ").split())
    return f"{said}; see {name} --help" if "bayestune" in name else said


def options_of(parser: ArgumentParser) -> list[str]:
    """All options of a command."""
    return [text for action in parser._actions for text in action.option_strings]


def _no_option(given: str, parser: ArgumentParser) -> str:
    if not given.startswith("-"):
        return f"got {given!r} where no value is expected: a list is written [a,b], without blanks"
    known = options_of(parser)
    near = nearest(given, known) or next((text for text in known if given in text), None)
    hint = f", did you mean {near}?" if near else ""
    return f"there is no option {given}{hint}"


def _missing(names: str, parser: ArgumentParser) -> tuple[str, str]:
    """The command that lacks something, and what, as it is typed."""
    found: list[tuple[str, str, str]] = [name.strip().rpartition(".") for name in names.split(",")]
    command = found[0][0] or parser.prog.rpartition(" ")[2]
    missing = {last for _, _, last in found}
    needed = [action for action in _actions(parser, command) if action.dest in missing]
    return command, ", ".join(_typed(command, action) for action in needed)


def _bad_value(name: str, why: str) -> str:
    got = _GOT.search(why)
    literal = re.search(r"Literal\[(.*?)\]", why)
    classes: list[str] = re.findall(r"<class '(\w+)'>", why.partition("Errors:")[0])
    if "Subtypes:" in why:
        classes = [*re.findall(r"(tuple|list|dict)\[", why), *classes]
    if literal and got:
        expected = f"one of {literal[1]}"
    elif classes and got:
        expected = " or ".join(_WORDS.get(kind, kind) for kind in dict.fromkeys(classes))
    else:
        return f"--{name}: {' '.join(why.split())}"
    return f"--{name}: got {got['value'].strip()!r}, expected {expected}"


# Help


def asks_for_help(given: Sequence[str]) -> bool:
    """Whether arguments ask for help."""
    return any(text in ("-h", "--help") or text.startswith("--help=") for text in given)


def methods_of_interest(given: Sequence[str]) -> set[str]:
    """The methods whose options help shows: those that are named, all if "all" is."""
    text = " ".join(given)
    if re.search(r"(-h|--help)[ =]all\b", text):
        return set(METHODS)
    named = re.findall(r"--(?:methods?|base)[ =]([^-]*)", text)
    found = {word for value in named for word in re.findall(r"\w+", value)} & set(METHODS)
    return found or {"blob"}


def help_text(given: Sequence[str], parser: ArgumentParser) -> str:
    """The help of the command that is named first."""
    own = _subparser(parser, given[0])
    own.usage = _usage(given[0], own)
    if any(action.dest == "base" for action in own._actions):
        own.epilog = (
            f"The options of other methods: bayestune {given[0]} --method NAME --help, NAME one of "
            f"{', '.join(METHODS)}; of all: bayestune {given[0]} --help all."
        )
    return own.format_help().rstrip()


def _usage(command: str, own: ArgumentParser) -> str:
    """A command with all that it needs, as it is typed: words without dashes first."""
    words, options = [], []
    for action in own._actions:
        typed = _typed(command, action)
        needed = action.required or not action.option_strings
        if not typed.startswith("-"):
            words.append(typed if needed else f"[{typed}]")
        elif needed:
            options.append(f"{typed} {typed[2:].upper()}")
    return " ".join(["bayestune", command, *words, *options, "[--OPTION VALUE …]"])


def _typed(command: str, action: Action) -> str:
    if action.option_strings:
        return as_typed(command, action.dest)
    return action.dest.upper() + (" …" if action.nargs == "+" else "")


def _actions(parser: ArgumentParser, command: str) -> Sequence[Action]:
    """The options of a command, given its parser or that of all commands."""
    own = parser if parser.prog.endswith(f" {command}") else _subparser(parser, command)
    return own._actions


def _subparser(parser: ArgumentParser, command: str) -> Any:
    choices = [action.choices for action in parser._actions if isinstance(action.choices, dict)]
    return choices[0][command]
