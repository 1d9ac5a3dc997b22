"""The parser's messages in one line with a remedy, and the help of a command."""

import re
from argparse import Action
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser

from bayestune.cli.words import as_typed
from bayestune.errors import nearest
from bayestune.methods import METHODS

_KINDS = {  # of values: a Python type → what users call it
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "tuple": "a list such as [a,b]",
    "list": "a list such as [a,b]",
    "dict": "settings such as {name: value}",
    "NoneType": "null",
}
# messages of argparse and jsonargparse
_UNKNOWN = re.compile(r"unrecognized arguments: (?P<given>.*)", re.DOTALL)
_NOT_ACCEPTED = re.compile(r"Subcommand '.*' does not accept option '(?P<name>[^']*)'")
_MISSING = re.compile(r"the following arguments are required: (?P<names>.*)", re.DOTALL)
_BAD_VALUE = re.compile(r'Parser key "(?P<name>[^"]*)":\s*(?P<why>.*)', re.DOTALL)
_GOT = re.compile(r"(?:Got|Given) value: (?P<value>.*)", re.DOTALL)


def one_line(message: str, parser: ArgumentParser) -> str:
    """What to say of a command line that does not parse.

    Args:
        message: of argparse or jsonargparse.
        parser: of the command, or of all commands.

    Returns:
        The message in one line, with the command whose help says more.
    """
    prog = parser.prog.replace(" [options]", "")
    if match := _UNKNOWN.fullmatch(message):
        words = match["given"].split()
        unknown = next((word for word in words if word.startswith("-")), words[0])
        text = _no_such_option(unknown.partition("=")[0], parser)
    elif match := _NOT_ACCEPTED.fullmatch(message):
        text = _no_such_option(f"--{match['name']}", parser)
    elif match := _MISSING.fullmatch(message):
        command, missing = _missing(match["names"], parser)
        prog = f"bayestune {command}"
        text = f"{prog} needs {missing}"
    elif match := _BAD_VALUE.fullmatch(message):
        text = _bad_value(match["name"], match["why"])
    else:
        text = " ".join(message.removeprefix("argument ").split())
    return f"{text}; see {prog} --help" if "bayestune" in prog else text


def _no_such_option(word: str, parser: ArgumentParser) -> str:
    """What to say of a word that is no option, such as a part of a list with blanks."""
    if not word.startswith("-"):
        return f"got {word!r} where no value is expected: a list is written [a,b], without blanks"
    known = options_of(parser)
    near = nearest(word, known) or next((option for option in known if word in option), None)
    hint = f", did you mean {near}?" if near else ""
    return f"there is no option {word}{hint}"


def options_of(parser: ArgumentParser) -> list[str]:
    """All options of a command, such as `--input`."""
    return [option for action in parser._actions for option in action.option_strings]


def _missing(names: str, parser: ArgumentParser) -> tuple[str, str]:
    """The command that lacks something, and what it lacks, as it is typed.

    Args:
        names: separated by commas, each perhaps behind the command's name and a dot.
        parser: of the command, or of all commands.
    """
    parts: list[tuple[str, str, str]] = [name.strip().rpartition(".") for name in names.split(",")]
    command = parts[0][0] or parser.prog.rpartition(" ")[2]
    missing = {name for _, _, name in parts}
    actions = [action for action in _actions(parser, command) if action.dest in missing]
    return command, ", ".join(_as_typed(command, action) for action in actions)


def _bad_value(name: str, why: str) -> str:
    """What to say of an option's value that is not of its type."""
    got = _GOT.search(why)
    literal = re.search(r"Literal\[(.*?)\]", why)
    classes: list[str] = re.findall(r"<class '(\w+)'>", why.partition("Errors:")[0])
    if "Subtypes:" in why:
        classes = [*re.findall(r"(tuple|list|dict)\[", why), *classes]
    if literal and got:
        expected = f"one of {literal[1]}"
    elif classes and got:
        expected = " or ".join(_KINDS.get(kind, kind) for kind in dict.fromkeys(classes))
    else:
        return f"--{name}: {' '.join(why.split())}"
    return f"--{name}: got {got['value'].strip()!r}, expected {expected}"


# Help


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether one of the arguments, as they are typed after `bayestune`, asks for help."""
    return any(word in ("-h", "--help") or word.startswith("--help=") for word in arguments)


def methods_of_interest(arguments: Sequence[str]) -> set[str]:
    """The methods whose options help shows.

    Args:
        arguments: what was typed after `bayestune`.

    Returns:
        All methods after `--help all`, else those that are named, else BLoB.
    """
    text = " ".join(arguments)
    if re.search(r"(-h|--help)[ =]all\b", text):
        return set(METHODS)
    words: set[str] = set()
    for value in re.findall(r"--(?:methods?|base)[ =]([^-]*)", text):
        words |= set(re.findall(r"\w+", value))
    return words & set(METHODS) or {"blob"}


def help_text(arguments: Sequence[str], parser: ArgumentParser) -> str:
    """The help of a command.

    Args:
        arguments: what was typed after `bayestune`: the command first.
        parser: of all commands.
    """
    command = arguments[0]
    subparser = _subparser(parser, command)
    subparser.usage = _usage(command, subparser)
    if any(action.dest == "base" for action in subparser._actions):
        subparser.epilog = (
            f"The options of other methods: bayestune {command} --method NAME --help, NAME one of "
            f"{', '.join(METHODS)}; of all: bayestune {command} --help all."
        )
    return subparser.format_help().rstrip()


def _usage(command: str, parser: ArgumentParser) -> str:
    """A command with all that it needs, as it is typed: words without dashes first."""
    words = []
    options = []
    for action in parser._actions:
        typed = _as_typed(command, action)
        is_needed = action.required or not action.option_strings
        if not typed.startswith("-"):
            words.append(typed if is_needed else f"[{typed}]")
        elif is_needed:
            options.append(f"{typed} {typed[2:].upper()}")
    return " ".join(["bayestune", command, *words, *options, "[--OPTION VALUE …]"])


def _as_typed(command: str, action: Action) -> str:
    """How a user types an option, or the name of what is typed without one."""
    if action.option_strings:
        return as_typed(command, action.dest)
    return action.dest.upper() + (" …" if action.nargs == "+" else "")


def _actions(parser: ArgumentParser, command: str) -> Sequence[Action]:
    """The options of a command, given its parser or that of all commands."""
    is_of_command = parser.prog.endswith(f" {command}")
    return parser._actions if is_of_command else _subparser(parser, command)._actions


def _subparser(parser: ArgumentParser, command: str) -> Any:
    """The parser of a command, in that of all commands."""
    choices = [action.choices for action in parser._actions if isinstance(action.choices, dict)]
    return choices[0][command]
