"""A posterior and how it came about: what its folder keeps, and what its records say."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import nn

from bayestune.adapters import is_spread
from bayestune.errors import Refusal
from bayestune.methods import METHODS
from bayestune.posteriors import (
    FitReport,
    Gaussian,
    Posterior,
    load_adapter,
    load_posterior,
    read_details,
    save_posterior,
)
from bayestune.runtime import is_first_process
from bayestune.scoring import Scorer
from bayestune.session.plain_adapter import calibrated_details
from bayestune.session.task_options import TaskOptions

REPORT_FILE = "training.json"
_COURSE = ("step", "loss", "kl", "std_over_prior")
_LINES = 200  # of the log, in a record


@dataclass(frozen=True)
class Fit:
    """A posterior, and what its folder says of how it was fitted."""

    posterior: Posterior
    details: Mapping[str, Any]  # method, base model, task, training …, as `posterior.json` has them
    bf16: bool  # whether to predict under bfloat16 autocast
    label: str  # what its lines of a table are called, before the number of draws
    first: Posterior | None = None  # the student that is asked before the draws, in a cascade

    @classmethod
    def of(cls, posterior: Posterior, details: Mapping[str, Any], bf16: bool | None = None) -> Self:
        """A fit whose predictions are as precise as its training, unless `bf16` says otherwise."""
        if bf16 is None:
            bf16 = bool(details["training"]["bf16"])
        return cls(posterior, details, bf16, _proper_name(details["method"]))

    @classmethod
    def load(cls, model: nn.Module, folder: Path, scorer: Scorer, bf16: bool | None) -> Self:
        """Reads what `save` wrote."""
        is_plain = calibrated_details(folder) is not None
        posterior = (load_adapter if is_plain else load_posterior)(model, folder, scorer)
        put_report(posterior, folder)
        return cls.of(posterior, details_of(folder), bf16)

    def save(self, folder: Path) -> None:
        """Writes the posterior with its details, and the report of its training.

        One process writes; where the parameters are spread over processes, all must call this.
        """
        if is_first_process():
            folder.mkdir(parents=True, exist_ok=True)
            report = json.dumps(self.posterior.report.as_dict(), indent=1)
            (folder / REPORT_FILE).write_text(f"{report}\n", encoding="utf-8")
        if is_first_process() or is_spread(self.posterior.model):
            # last, because a folder that holds a posterior counts as finished
            save_posterior(self.posterior, folder, self.details)

    def facts(self, options: TaskOptions) -> dict[str, Any]:
        """What every record says of the fit, and of how the rows of `options` were put to it."""
        details = self.details
        seconds = self.posterior.report.seconds  # 0 where its folder does not say
        return {
            "model": name_in_records(details["base_model"]),
            "method": details["method"],
            "name": _proper_name(details["method"]),
            "train_rows": details["train_rows"],
            "scoring": details["scoring"],
            "seed": details["training"]["seed"],
            "config": {
                "method": details["fields"],
                "training": details["training"],
                "questions": options.recorded(details.get("questions", details)),
                "dtype": details["dtype"],
                "bf16": self.bf16,
            },
            "seconds": {"fit": round(seconds, 1)} if seconds else {},
            **self.course(),
        }

    def course(self) -> dict[str, Any]:
        """How the fit went and where it ended, as far as that is known; under `fit` in a record.

        `history` has lines of the log (the loss, the KL in nats, the mean σ/σ_p); `std` the mean
        standard deviation of each Gaussian slot, beside the prior's.
        """
        course: dict[str, Any] = {}
        history = _thinned(self.posterior.report.history)
        if history:
            course["history"] = history
        if isinstance(self.posterior, Gaussian):
            layers = self.posterior.layers()
            stds = {name: float(layer.std.detach().mean()) for name, layer in layers.items()}
            course["std"] = {name: float(f"{std:.4g}") for name, std in stds.items()}
            settings = self.posterior.report.settled(self.details["fields"])
            course["prior_std"] = settings.get("prior_std")
        return {"fit": course} if course else {}


def _thinned(lines: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """At most 200 lines of a log, evenly spaced, the last among them; of each what records keep."""
    stride = max(1, -(-len(lines) // _LINES))
    course = []
    for line in lines[::-stride]:
        kept = {key: line[key] for key in _COURSE if key in line}
        if len(kept) > 1:  # not the step alone
            course.append(kept)
    return course[::-1]


def put_report(posterior: Posterior, folder: Path) -> None:
    """Gives a loaded posterior the report of its fit, if its folder holds one."""
    if (report := read_report(folder)) is not None:
        posterior.report = report


def read_report(folder: Path) -> FitReport | None:
    """What a fit took: its seconds, memory and history; None if its folder does not say."""
    path = folder / REPORT_FILE
    if not path.is_file():
        return None
    return FitReport.of_dict(json.loads(path.read_text(encoding="utf-8")))


def details_of(folder: Path) -> dict[str, Any]:
    """What `posterior.json` says of a fit, its method always by the key in `METHODS`.

    For a plain adapter it is what its calibration keeps.

    Args:
        folder: of `fit`, or a calibrated adapter's.

    Raises:
        Refusal: if the folder does not say how it was fitted, as that of `save_posterior` alone.
    """
    details = calibrated_details(folder) or read_details(folder)
    if "method" not in details:
        raise Refusal(
            f"{folder} does not say how it was fitted: got a posterior alone, expected a folder of "
            "`fit`; use it with load_posterior"
        )
    key = method_key(details["method"])
    return {**details, "method": key, "fields": {"method": key, **details["fields"]}}


def method_key(named: str) -> str:
    """A method's key in `METHODS`; old folders name the class in small letters instead."""
    keys = {method.__name__.lower(): key for key, method in METHODS.items()}
    return named if named in METHODS else keys.get(named, named)


def name_in_records(model: str) -> str:
    """A model's name in records and tables, without the folders of any machine."""
    path = Path(model)
    return path.name if path.is_absolute() or path.exists() else model


def _proper_name(method: str) -> str:
    """The name of a method's class, which tables show: "MCDropout" for "mc_dropout"."""
    return METHODS[method].__name__ if method in METHODS else method
