"""All that is known of a posterior that is shared: from its folder, and from records of it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Self

from safetensors.torch import load_file

from bayestune.adapters import CONFIG, TENSORS
from bayestune.decisions import Calibration
from bayestune.errors import Refusal
from bayestune.evaluation import Record, read_records
from bayestune.posteriors import (
    FitReport,
    artefact_folder,
    base_name,
    is_hub_id,
    posterior_digest,
)
from bayestune.report import renewed
from bayestune.session import details_if_any, details_of, read_calibration, read_report, shown


@dataclass(frozen=True)
class Known:
    """All that a card can say of a posterior.

    Args:
        place: its folder.
        digest: of the folder.
        details: what `posterior.json` says; empty of a plain adapter.
        lora: its `adapter_config.json`; empty of a mixture's folder.
        base: the name of the base model.
        records: of its evaluations.
        calibration: its own.
    """

    place: Path
    digest: str
    details: Mapping[str, Any]
    lora: Mapping[str, Any]
    base: str | None
    records: Sequence[Record]
    calibration: Calibration | None

    @classmethod
    def of(
        cls,
        folder: str | PathLike[str],
        records: Sequence[Record] | None = None,
        base_model: str | None = None,
    ) -> Self:
        """Reads a folder; records that are given must be of its posterior.

        Raises:
            Refusal: if none of the records that are given is.
        """
        place = artefact_folder(folder)
        details = details_if_any(place)
        if "method" in details:
            details = details_of(place)
        path = place / CONFIG
        lora = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        base = base_model or details.get("base_model") or base_name(place)
        given = records
        if given is None:
            given = [dict(record) for record in renewed(read_records(place), place)]
        own = [record for record in given if _is_of(record, details)]
        if records and not own:
            got = sorted({f"{r.get('method')} on {r.get('task')}" for r in records})[:3]
            raise Refusal(
                f"got {len(records)} records ({', '.join(got)}), of which none is of the fit in "
                f"{place}: expected its method, settings, seed and base; give the folder that "
                "`evaluate` wrote to"
            )
        digest = posterior_digest(place)
        return cls(place, digest, details, lora, base, own, read_calibration(place))

    @property
    def base_on_hub(self) -> str | None:
        """The base model's id on the Hub; None of a folder, a file or a wheel."""
        name = self.base or ""
        return name if is_hub_id(name) and "@" not in name else None

    @property
    def std(self) -> float | None:
        """The mean of the standard deviations of A's entries; None if it is not a Gaussian."""
        path = self.place / TENSORS
        if self.details.get("posterior") != "gaussian" or not path.is_file():
            return None
        roots = [value for name, value in load_file(path).items() if name.endswith("root_std")]
        if not roots:
            return None
        total = sum(float(root.double().square().sum()) for root in roots)
        return total / sum(root.numel() for root in roots)

    @property
    def report(self) -> FitReport | None:
        """What the fit took, where the folder says so."""
        return read_report(self.place)


def _is_of(record: Record, details: Mapping[str, Any]) -> bool:
    """Whether a record is of the fit that a folder holds: method, settings, seed, base, rows."""
    if "fields" not in details:
        return False
    config = record.get("config", {})
    training = json.loads(json.dumps(details["training"], default=str))
    recorded = config.get("training", {})
    where = ("output", "resume", "progress")
    same = all(recorded.get(name) == training[name] for name in training if name not in where)
    own = json.loads(json.dumps(details["fields"], default=str))
    return (
        same
        and config.get("method") == own
        and record.get("model") == shown(details["base_model"])
        and record.get("train_rows") == details["train_rows"]
    )
