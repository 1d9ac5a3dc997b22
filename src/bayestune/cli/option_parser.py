"""A parser to which an option is added in one line, and which says in one line what is wrong."""

import shutil
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from bayestune.cli.slips import one_line
from bayestune.cli.start import EXIT_BAD_INPUT
from bayestune.cli.words import read_options_as_words, words_as_json


class HelpFormatter(DefaultHelpFormatter):
    """Help in lines as wide as the terminal, and of 100 columns at least."""

    def __init__(self, prog: str) -> None:
        width = max(shutil.get_terminal_size((100, 24)).columns, 100)
        super().__init__(prog, max_help_position=32, width=width)


class Parser(ArgumentParser):
    """The parser of a command, or of all commands.

    Attributes:
        methods: those whose options a command that fits has.
    """

    methods: Collection[str] = ()

    def __init__(self, **settings: Any) -> None:
        # without abbreviations: a mistyped option would be taken for one that was not meant
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **settings)

    def parse_args(self, args: Any = None, *more: Any, **settings: Any) -> Any:
        """`ArgumentParser.parse_args` that takes the options of rows as words, here and in YAML."""
        read_options_as_words()
        arguments = sys.argv[1:] if args is None else args
        return super().parse_args(words_as_json(arguments), *more, **settings)

    def option(self, name: str, kind: Any, default: Any, text: str) -> None:
        """Adds an option that may be left out.

        Args:
            name: without the dashes.
            kind: the type that its value is parsed as.
            default: its value if it is left out.
            text: of the help.
        """
        self.add_argument(f"--{name}", type=kind, default=default, help=text)

    def required_path(self, name: str, text: str) -> None:
        """Adds an option that is a path and must be given.

        Args:
            name: without the dashes.
            text: of the help.
        """
        self.add_argument(f"--{name}", type=Path, required=True, help=text)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Says in one line what does not parse, and ends the process with `EXIT_BAD_INPUT`."""
        parser: Any = getattr(ex, "subcommand_parser", None) or self
        print(f"bayestune: error: {one_line(message, parser)}", file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT)
