"""Data as JSON that may stand in a script element of the page."""

import json
from typing import Any

Payload = dict[str, Any]  # what JSON can hold, by name


def as_json(data: Any) -> str:
    """Data as compact JSON, with `<` and line separators escaped: nothing ends the element early.

    Args:
        data: of dictionaries, lists, texts and finite numbers.

    Raises:
        ValueError: if a number is not finite.
    """
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def json_bytes(data: Any) -> int:
    """How many bytes the data takes as JSON in the page."""
    return len(as_json(data).encode("utf-8", "backslashreplace"))
