"""A calibration: everything that was chosen on held-out rows, kept as `calibration.json`."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from bayestune.decisions.sets import SetKind, SetRule
from bayestune.decisions.thresholds import Threshold
from bayestune.errors import POSITIVE, Refusal
from bayestune.whole_files import write_text_whole

FILE_NAME = "calibration.json"
_DIGITS = 8  # of the held-out scores that are kept
_FORMAT = 1


def as_kept(scores: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Scores by name, rounded to the digits in which a calibration keeps those of held-out rows.

    New rows' scores are rounded in the same way before they are compared: some of sure rows are
    below the last digit, and 1e-9 beside 0 would look like another distribution.

    Args:
        scores: by name, (N,) each.
    """
    rounded = {}
    for name, values in scores.items():
        rounded[name] = [round(value, _DIGITS) for value in values.tolist()]
    return rounded


@dataclass(frozen=True)
class Calibration:
    """What was chosen on held-out rows, and for which posterior.

    Args:
        posterior: digest of the posterior that it belongs to.
        method: how that was fitted, for people.
        variant: the way of predicting that was kept, and in `settings` how to do it again.
        temperature: T on its logits; 1 if it is kept as it is.
        score: the name of the score that decisions are made by.
        thresholds: one for each score on offer, by name; each promise holds for its own score.
        sets: the rules of sets, by kind.
        set_kind: the kind that decisions carry.
        num_choosing: rows that variant, temperature and score were chosen on.
        num_thresholds: rows that thresholds and sets were chosen on.
        rows: digest of the held-out rows.
        bands: thresholds of bands on the score, strictest first; none unless asked for.
        classes: thresholds by index of the choice, as text; none unless asked for.
        costs: of errors, (C, C); none if all are the same.
        table: the variants compared.
        versions: of the libraries.
        date: of the calibration, ISO 8601.
        settings: see `variant`.
        held_out: scores of the held-out rows by name, which new rows are compared with (`drift`).
        baselines: on the rows that thresholds were chosen on, what costs nothing: `chance` and
            `majority`, accuracies of a guess and of the commonest answer, and `always_act`, the
            mean loss of acting on all; always asking acts on none.
    """

    posterior: str
    method: str
    variant: str
    temperature: float
    score: str
    thresholds: Mapping[str, Threshold]
    sets: Mapping[str, SetRule]
    set_kind: SetKind
    num_choosing: int
    num_thresholds: int
    rows: str
    bands: Mapping[str, Threshold] = field(default_factory=dict)
    classes: Mapping[str, Threshold] = field(default_factory=dict)
    costs: list[list[float]] | None = None
    table: list[dict[str, Any]] = field(default_factory=list)
    versions: Mapping[str, str] = field(default_factory=dict)
    date: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    held_out: Mapping[str, list[float]] = field(default_factory=dict)
    baselines: Mapping[str, float] = field(default_factory=dict)

    @property
    def threshold(self) -> Threshold:
        """That of the score that decisions are made by."""
        return self.thresholds[self.score]

    @property
    def acting(self) -> str:
        """What a decision to act is called: the strictest band, where there are bands."""
        return next(iter(self.bands), "act")

    def applied(self) -> dict[str, Any]:
        """What a prediction says was applied to it; with bands the risk is the strictest one's."""
        bands = {name: band.risk for name, band in self.bands.items()}
        return {
            "variant": self.variant,
            "temperature": self.temperature,
            "score": self.score,
            "risk": next(iter(bands.values()), self.threshold.risk),
            "confidence": self.threshold.confidence,
            "rows": self.num_choosing + self.num_thresholds,
            "date": self.date,
            **({"bands": bands} if bands else {}),
        }

    def check(self, posterior: str) -> None:
        """Refuses another posterior than the one it was made for, such as a refitted one.

        Args:
            posterior: its digest.
        """
        if posterior != self.posterior:
            raise Refusal(
                f"got a calibration of another posterior ({self.posterior[:12]}…, not "
                f"{posterior[:12]}…); expected its own: it was fitted again or changed; run "
                "`bayestune calibrate` again"
            )

    def to_json(self) -> str:
        """The text of `calibration.json`."""
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The calibration that `to_json` wrote.

        Raises:
            Refusal: if it is something else, or of a later format.
        """
        try:
            facts = json.loads(text)
            written = facts.pop("format")
            if written != _FORMAT:  # first, because a later format may have other fields
                got = f"a calibration of format {written}"
                raise Refusal(f"got {got}; expected {_FORMAT}; update bayestune")
            for name in ("thresholds", "bands", "classes"):
                facts[name] = {key: Threshold(**value) for key, value in facts[name].items()}
            facts["sets"] = {key: SetRule(**value) for key, value in facts["sets"].items()}
            calibration = cls(**facts)
            calibration._check_names()
        except Refusal:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            expected = "what `bayestune calibrate` writes"
            raise Refusal(f"got {error}; expected {expected}; calibrate again") from error
        return calibration

    def _check_names(self) -> None:
        """Raises ValueError if score or sets name nothing that was fitted, or T is not positive."""
        if self.score not in self.thresholds or self.set_kind not in self.sets:
            raise ValueError(
                f"the score {self.score!r} or sets {self.set_kind!r} without their own"
            )
        if self.temperature not in POSITIVE:
            raise ValueError(f"temperature={self.temperature!r}")

    def write(self, folder: Path) -> Path:
        """Writes `calibration.json` into a folder, whole or not at all; returns its path."""
        path = folder / FILE_NAME
        write_text_whole(path, self.to_json())
        return path

    @classmethod
    def read(cls, folder: Path, posterior: str) -> Self | None:
        """That of a folder, or None if it has none; refused if it is of another posterior."""
        path = folder / FILE_NAME
        if not path.is_file():
            return None
        calibration = cls.from_json(path.read_text(encoding="utf-8"))
        calibration.check(posterior)
        return calibration
