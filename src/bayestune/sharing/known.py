"""All that is known of a shared posterior: from its folder, and from records of its evaluations."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, Self

from safetensors.torch import load_file
from torch import Tensor

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
from bayestune.session import (
    details_if_any,
    details_of,
    name_in_records,
    read_calibration,
    read_report,
)


@dataclass(frozen=True)
class Known:
    """All that a card can say of a posterior.

    Args:
        place: its folder.
        digest: of the folder.
        details: what `posterior.json` says; empty for a plain adapter.
        lora: what `adapter_config.json` says; empty for a mixture's folder.
        base: the name of the base model.
        records: of its evaluations.
        calibration: the one in its folder, if any.
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
        """Reads a folder.

        Args:
            folder: of `fit`, or a LoRA adapter's.
            records: of evaluations, perhaps of other fits too, which are left out; None for those
                that lie in the folder.
            base_model: the name of the base model, if not the one that the folder names.

        Raises:
            Refusal: if records are given and none is of this fit.
        """
        place = artefact_folder(folder)
        details = details_if_any(place)
        if "method" in details:
            details = details_of(place)
        path = place / CONFIG
        lora = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        base = base_model or details.get("base_model") or base_name(place)
        candidates = records
        if candidates is None:
            candidates = [dict(record) for record in renewed(read_records(place), place)]
        own = [record for record in candidates if _is_of(record, details)]
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
        """The base model's id on the Hub; None if it is a folder, a file or a wheel."""
        name = self.base or ""
        return name if is_hub_id(name) and "@" not in name else None

    @property
    def std(self) -> float | None:
        """The mean of G², the entries' standard deviations; None if it is not a Gaussian."""
        roots = self._roots.values()
        if not roots:
            return None
        total = sum(float(root.double().square().sum()) for root in roots)
        return total / sum(root.numel() for root in roots)

    @property
    def sides(self) -> str:
        """Whose entries have the prior: A's, or under MAP and where both are Gaussian B's too."""
        is_of_both = any(".lora_B." in name for name in self._roots)
        is_map = self.details.get("fields", {}).get("method") == "map"
        return "A and B" if is_of_both or is_map else "A"

    @cached_property
    def _roots(self) -> dict[str, Tensor]:
        """G by the name of its tensor; none if the posterior is not a Gaussian."""
        path = self.place / TENSORS
        if self.details.get("posterior") != "gaussian" or not path.is_file():
            return {}
        tensors = load_file(path).items()
        return {name: value for name, value in tensors if name.endswith("root_std")}

    @property
    def report(self) -> FitReport | None:
        """What the fit took, where the folder says so."""
        return read_report(self.place)


def _is_of(record: Record, details: Mapping[str, Any]) -> bool:
    """Whether a record is of the fit that a folder holds: method, settings, seed, base, rows."""
    if "fields" not in details:
        return False
    config = record.get("config", {})
    recorded = config.get("training", {})
    training = _as_read(details["training"])
    no_matter = ("output", "resume", "progress")
    same_training = all(
        recorded.get(name) == value for name, value in training.items() if name not in no_matter
    )
    return (
        same_training
        and config.get("method") == _as_read(details["fields"])
        and record.get("model") == name_in_records(details["base_model"])
        and record.get("train_rows") == details["train_rows"]
    )


def _as_read(value: Any) -> Any:
    """A value as it is read from JSON, to compare with what was."""
    return json.loads(json.dumps(value, default=str))
