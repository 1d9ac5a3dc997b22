"""A row's options: read from however a cell lists them, and checked."""

import ast
import json
from collections import Counter
from collections.abc import Collection
from typing import Any

from bayestune.data.column_roles import as_option
from bayestune.errors import Refusal


def option_list(cell: Any, place: str) -> tuple[list[Any], tuple[str, ...]]:
    """A row's options, and the labels that its cell has for them.

    Args:
        cell: a list of texts; {"text": [texts], "label": [labels]}; {label: text, …}; a list of
            {"text": …, "label": …}; or a text with one of these in JSON or as Python prints it, or
            with texts joined by "|".
        place: where the row stands, for messages.

    Returns:
        The options, not checked, and their labels, none if the cell has none.

    Raises:
        Refusal: if the cell is none of these, or has labels for some options only.
    """
    if isinstance(cell, str):
        cell = _parsed_cell(cell, place)
    labels: list[Any] = []
    options = cell
    if isinstance(cell, dict) and isinstance(cell.get("text"), list):
        labels = cell.get("label") or []
        options = cell["text"]
    elif isinstance(cell, dict):
        labels = list(cell)
        options = list(cell.values())
    elif isinstance(cell, list) and cell and all(isinstance(each, dict) for each in cell):
        labels = [each["label"] for each in cell if "label" in each]
        options = [each.get("text") for each in cell]
    if not isinstance(options, list):
        raise Refusal(f"row {place}: got options {options!r}, expected a list of texts")
    if labels and len(labels) != len(options):
        raise Refusal(
            f"row {place}: got {len(labels)} labels of {len(options)} options, expected one for "
            "each"
        )
    return options, tuple(str(label).strip() for label in labels)


def _parsed_cell(text: str, place: str) -> Any:
    """What a cell of text holds: JSON, what Python prints, or texts joined by "|"."""
    if text.lstrip()[:1] not in ("[", "{"):
        return text.split("|")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            got = f"got options {text!r}, expected a JSON list ({error})"
            raise Refusal(f"row {place}: {got}") from None


def checked_options(options: Collection[Any], place: str) -> tuple[str, ...]:
    """Options as texts, without outer spaces.

    Args:
        options: as a file or the user gives them.
        place: what they belong to, for messages.

    Raises:
        Refusal: if there are fewer than two, one is empty or no text, or two are the same.
    """
    if isinstance(options, str):
        raise Refusal(f"{place}: got options {options!r}, expected a list of texts")
    texts = []
    for option in options:
        texts.append(as_option(option, place))
    if len(texts) < 2:
        raise Refusal(
            f"{place}: got {len(texts)} options, expected at least two; in one cell join them "
            'by "|"'
        )
    if twice := [text for text, count in Counter(texts).items() if count > 1]:
        raise Refusal(
            f"{place}: got the options {twice} more than once in {texts}, expected each once; "
            "drop or reword one"
        )
    return tuple(texts)
