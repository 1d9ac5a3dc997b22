"""What a calibration is asked for: the promises, the scores, the sets."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from bayestune.decisions.bands import check_bands
from bayestune.decisions.bounds import Promise
from bayestune.decisions.costs import check_costs
from bayestune.decisions.row_scores import ROW_SCORES
from bayestune.decisions.sets import SetKind, check_coverage
from bayestune.errors import Refusal


@dataclass(frozen=True, eq=False)
class CalibrationOptions:
    """What a calibration is asked for.

    Args:
        promise: the risk among the rows acted on, and the confidence. With bands the risk is that
            of the strictest one.
        scores: names of `ROW_SCORES` on offer; extra scores, of rows and variants, always are.
        set_coverage: of the sets.
        set_kind: the sets that decisions carry; all kinds are fitted.
        bands: rising risks by name, {"act": 0.05, "flag": 0.2}: bands in place of act and abstain.
        per_class: thresholds for each choice by itself, where classes mean the same in every row.
        costs: (C, C), of choosing the column where the row is right. The risk is then the mean cost
            as a share of the greatest.
        choosing_share: of the rows, for the choices; the others are for the promises.
        folds: of the comparison.
    """

    promise: Promise = field(default_factory=Promise)
    scores: tuple[str, ...] = ROW_SCORES
    set_coverage: float = 0.9
    set_kind: SetKind = "lac"
    bands: Mapping[str, float] | None = None
    per_class: bool = False
    costs: Tensor | None = None
    choosing_share: float = 0.5
    folds: int = 5

    def __post_init__(self) -> None:
        if not 0 < self.choosing_share < 1:
            got = f"choosing_share={self.choosing_share}"
            raise Refusal(f"got {got}; expected between 0 and 1; half of the rows is customary")
        if self.bands and self.per_class:
            raise Refusal("got bands and per_class; expected one of them; choose one")
        check_coverage(self.set_coverage)
        if self.costs is not None:
            check_costs(self.costs)
        if self.bands:
            check_bands(self.bands)
            strictest = Promise(next(iter(self.bands.values())), self.promise.confidence)
            object.__setattr__(self, "promise", strictest)
        if self.folds < 2:
            raise Refusal(f"got folds={self.folds}; expected 2 or more; 5 is customary")
