"""Doctests in docstrings as blocks of code, which Markdown would take for quotations."""

import re
from typing import Any

import griffe

DOCTEST = re.compile(r"(?:^>>> .*\n?)(?:^[ ]*\S.*\n?)*", re.MULTILINE)


class DoctestFences(griffe.Extension):
    """Puts fences around the doctests of every docstring that is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrites the docstring of a class, function, attribute or module."""
        if obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """A docstring with its doctests fenced; those of an indented section are known already."""
    return DOCTEST.sub(lambda match: f"```pycon\n{match[0].rstrip()}\n```\n", text).rstrip()
