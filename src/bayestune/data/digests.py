"""Hashes of what settings and rows hold."""

import hashlib
import json
from collections.abc import Callable
from typing import Any


def digest(*parts: Any, default: Callable[[Any], Any] = str) -> str:
    """SHA-256, in hexadecimal digits, of what JSON can hold, whatever the order of its keys.

    Args:
        *parts: what is hashed.
        default: turns anything that JSON cannot hold into something that it can.
    """
    text = json.dumps(parts, sort_keys=True, default=default)
    return hashlib.sha256(text.encode()).hexdigest()
