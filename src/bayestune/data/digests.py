"""Hashes of what settings and rows hold."""

import hashlib
import json
from collections.abc import Callable
from typing import Any


def digest(*parts: Any, default: Callable[[Any], Any] = str) -> str:
    """SHA-256, in hexadecimal digits, of what JSON can hold, whatever the order of its keys.

    Args:
        *parts: what is hashed.
        default: of anything else, what JSON can hold.
    """
    text = json.dumps(parts, sort_keys=True, default=default)
    return hashlib.sha256(text.encode()).hexdigest()
