"""A record → the rows of its predictions file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_rows(record: Mapping[str, Any], folder: str | Path) -> list[dict[str, Any]]:
    """The rows that a record's metrics were computed from.

    Args:
        record: names its file under "predictions".
        folder: where that file is.

    Returns:
        What `bayestune.evaluation.prediction_rows` made; none if the file is missing.
    """
    path = Path(folder) / str(record.get("predictions") or "predictions missing")
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    return [json.loads(line) for line in lines if line.strip()]
