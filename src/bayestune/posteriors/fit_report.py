"""What a fit reports beside its posterior."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Self


@dataclass(frozen=True)
class FitReport:
    """What a fit took, and what a method chose on the way.

    Args:
        seconds: of the whole fit.
        steps: of the optimiser.
        history: the log lines of the training.
        peak_memory_mb: the largest amount of memory in use during the fit, in MB.
        extra: what a method adds, such as a temperature; values that JSON can hold.
    """

    seconds: float = 0.0
    steps: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    peak_memory_mb: float = 0.0
    extra: Mapping[str, Any] = field(default_factory=dict)

    def plus(self, seconds: float = 0.0, peak_memory_mb: float = 0.0, **extra: Any) -> Self:
        """The report with seconds and extras added, and the larger of two peaks of memory."""
        seconds += self.seconds
        peak = max(self.peak_memory_mb, peak_memory_mb)
        return replace(self, seconds=seconds, peak_memory_mb=peak, extra={**self.extra, **extra})

    def settled(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """A method's settings as its fit ran with them: a chosen value in the place of "auto".

        Args:
            settings: by name, as they were asked for, such as `final_std="auto"`.
        """
        return {name: self.extra.get(name, value) for name, value in settings.items()}

    def as_dict(self) -> dict[str, Any]:
        """One flat dict, as the posterior's folder keeps it."""
        values = asdict(self)
        return {**values.pop("extra"), **values}

    @classmethod
    def of_dict(cls, values: Mapping[str, Any]) -> Self:
        """The report of what `as_dict` returned."""
        names = {f.name for f in fields(cls)} - {"extra"}
        own = {name: value for name, value in values.items() if name in names}
        extra = {name: value for name, value in values.items() if name not in names}
        return cls(**own, extra=extra)
