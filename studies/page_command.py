"""The command of a page that is rendered from records: writes it, or fails while it is stale."""

import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RenderedPage:
    """A page, where its records are, and how its text is made anew from both.

    Args:
        study: the module that is run.
        about: its docstring.
        results: the folder of the records.
        page: the file.
        rendered: from the page's text and the folder to the new text.
    """

    study: str
    about: str | None
    results: Path
    page: Path
    rendered: Callable[[str, Path], str]

    def run(self, arguments: Sequence[str] | None = None) -> None:
        """Renders the page, or checks it."""
        parser = ArgumentParser(
            description=self.about, formatter_class=ArgumentDefaultsHelpFormatter
        )
        add = parser.add_argument
        add("--results", type=Path, default=self.results, help="folder of the records")
        add("--page", type=Path, default=self.page, help="the page")
        add("--check", action="store_true", help="write nothing; exit with 1 if the page is stale")
        options = parser.parse_args(arguments)
        before = options.page.read_text(encoding="utf-8")
        after = self.rendered(before, options.results)
        if not options.check:
            options.page.write_text(after, encoding="utf-8")
        elif before != after:
            sys.exit(f"{options.page} is stale: run python -m studies.{self.study}")
