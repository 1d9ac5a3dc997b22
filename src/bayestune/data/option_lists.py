"""A row's options: read from however a cell lists them, and checked."""

import ast
import json
from collections import Counter
from collections.abc import Collection
from typing import Any

from bayestune.data.column_roles import as_option
from bayestune.errors import Refusal


def option_list(own: Any, place: str) -> tuple[list[Any], tuple[str, ...]]:
    """A row's options, and their own labels if the cell names some."""
    if isinstance(own, str):
        own = _parsed_cell(own, place)
    labels: list[Any] = []
    if isinstance(own, dict) and isinstance(own.get("text"), list):
        labels = own.get("label") or []
        own = own["text"]
    elif isinstance(own, dict):
        labels = list(own)
        own = list(own.values())
    elif isinstance(own, list) and own and all(isinstance(each, dict) for each in own):
        labels = [each["label"] for each in own if "label" in each]
        own = [each.get("text") for each in own]
    if not isinstance(own, list):
        raise Refusal(f"row {place}: got options {own!r}, expected a list of texts")
    if labels and len(labels) != len(own):
        raise Refusal(
            f"row {place}: got {len(labels)} labels of {len(own)} options, expected one for each"
        )
    return own, tuple(str(label).strip() for label in labels)


def _parsed_cell(text: str, place: str) -> Any:
    """A cell of text as a list: in JSON, as Python prints it, or joined by bars."""
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
    """Options as texts.

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
