"""A parser whose options take a line each, and whose errors do too."""

import shutil
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from bayestune.cli.slips import one_line
from bayestune.cli.start import EXIT_BAD_INPUT
from bayestune.cli.words import read_options_as_words, spelled_out


class HelpFormatter(DefaultHelpFormatter):
    """Help in wide lines."""

    def __init__(self, prog: str) -> None:
        width = max(shutil.get_terminal_size((100, 24)).columns, 100)
        super().__init__(prog, max_help_position=32, width=width)


class Parser(ArgumentParser):
    """A parser whose options take a line each, and whose errors do too."""

    methods: Collection[str] = ()  # whose options a command that fits has

    def __init__(self, **given: Any) -> None:
        # an abbreviation would be an option that was not meant
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **given)

    def parse_args(self, args: Any = None, *more: Any, **given: Any) -> Any:
        """Parses arguments in which options of rows are words."""
        read_options_as_words()
        return super().parse_args(
            spelled_out(sys.argv[1:] if args is None else args), *more, **given
        )

    def option(self, name: str, kind: Any, default: Any, text: str) -> None:
        """Adds an option that may be left out."""
        self.add_argument(f"--{name}", type=kind, default=default, help=text)

    def needed(self, name: str, text: str) -> None:
        """Adds an option that is a path and must be given."""
        self.add_argument(f"--{name}", type=Path, required=True, help=text)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Says in a line what does not parse, and ends the process with 2."""
        named: Any = getattr(ex, "subcommand_parser", None) or self
        print(f"bayestune: error: {one_line(message, named)}", file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT)
