"""What is shared: a posterior, opened from its folder, and what is known of it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, Self

from bayestune.data import own_task
from bayestune.decisions import Calibration
from bayestune.errors import Refusal
from bayestune.models import LoadedModel
from bayestune.posteriors import (
    DETAILS,
    Posterior,
    artefact_folder,
    posterior_digest,
    read_details,
)
from bayestune.scoring import LetterScorer
from bayestune.session import (
    PredictionOptions,
    details_if_any,
    load_posterior_or_adapter,
    name_of_base,
    open_model,
    prompt_of_fit,
    read_calibration,
)


@dataclass(frozen=True)
class Source:
    """A posterior and what its folder says of it.

    Args:
        posterior: whose adapters are shared.
        details: what `posterior.json` says; empty where there is none.
        base: the name of the base model.
        place: its folder; None for a posterior in memory.
        digest: of the folder.
        calibration: the one in its folder, if any.
        tokens: how the labels of letter scoring are written: label, token id and text.
    """

    posterior: Posterior
    details: Mapping[str, Any] = field(default_factory=dict)
    base: str | None = None
    place: Path | None = None
    digest: str | None = None
    calibration: Calibration | None = None
    tokens: tuple[dict[str, Any], ...] = ()

    @classmethod
    def of(cls, given: Posterior | str | PathLike[str], model: str | None = None) -> Self:
        """Opens a posterior; one in a folder is loaded on its base model.

        Args:
            given: a posterior, or its folder or Hub id.
            model: the name of the base model, if it is not the one that the folder names.

        Raises:
            Refusal: if it is neither a posterior nor an adapter, or does not name its base.
        """
        if isinstance(given, Posterior):
            configs: Any = getattr(given.model, "peft_config", {})
            config = configs.get(given.adapter)
            base = getattr(config, "base_model_name_or_path", None)
            return cls(given, base=base, digest=given.digest)
        place = artefact_folder(given)
        details = details_if_any(place)
        name = name_of_base(place, details, model)
        calibration = read_calibration(place)
        loaded = open_model(name, details.get("dtype", "float32"), details.get("classes"))
        return cls(
            load_posterior_or_adapter(loaded.model, place),
            details,
            loaded.name,
            place,
            posterior_digest(place),
            calibration,
            _label_tokens(loaded, details),
        )

    @property
    def name(self) -> str:
        """The default name of its adapters on a server."""
        return self.place.resolve().name if self.place else "posterior"

    @property
    def described(self) -> str:
        """How an error names the posterior."""
        method = self.details.get("method")
        return f"a posterior of {method}" if method else f"a {type(self.posterior).__name__}"

    @property
    def way(self) -> PredictionOptions:
        """How it predicts: as calibrated, or else with ten draws."""
        return PredictionOptions.of(self.calibration.settings if self.calibration else {})

    def factor(self, count: int, seed: int) -> float:
        """The calibration's factor on Ω, if it was chosen for these draws, else 1.

        Args:
            count: S.
            seed: of the draws.
        """
        way = self.way
        return way.factor if (way.draws, way.draw_seed) == (count, seed) else 1.0

    def calibrated_temperature(self, role: str, count: int, seed: int) -> float:
        """The calibration's temperature T if it holds for what a server predicts with, else 1.

        Args:
            role: what that is: the "mean", a "student", or the "average" over draws.
            count: S, of the average.
            seed: of its draws.
        """
        if self.calibration is None or not self._is_calibrated(role, count, seed):
            return 1.0
        return self.calibration.temperature

    def _is_calibrated(self, role: str, count: int, seed: int) -> bool:
        """Whether the calibration was made of predictions like these."""
        way = self.way
        if role == "student":
            return way.student is not None and way.band is None
        plain = way.student is None and way.band is None
        atoms = self.posterior.atoms
        if role == "mean":
            return plain and (atoms == 1 or way.draws == 0)
        same_draws = atoms is not None or (way.draws, way.draw_seed) == (count, seed)
        return role == "average" and plain and same_draws

    def facts(self) -> dict[str, Any]:
        """What a manifest says of the posterior."""
        names = ("method", "fields", "train_rows")
        of_fit = {name: self.details[name] for name in names if name in self.details}
        training = self.details.get("training", {})
        calibration = self.calibration.applied() if self.calibration else None
        return {
            "base_model": self.base,
            "posterior": {
                "kind": self.posterior.kind,
                **of_fit,
                "seed": training.get("seed"),
                "bf16": training.get("bf16"),
                "digest": self.digest,
            },
            "questions": self._questions(),
            "calibration": calibration,
        }

    def _questions(self) -> dict[str, Any] | None:
        """How rows are put: the template up to the answer, and what the answers' tokens are."""
        if "task" not in self.details:
            return None
        scoring = self.details["scoring"]
        prompt = prompt_of_fit(self.details)
        return {
            "scoring": scoring,
            "prompt": prompt.template(scoring),
            "chat": prompt.chat,
            "system": prompt.system,
            "answers": list(self.tokens),
            "classes": self.details.get("class_names"),
            "max_length": self.details.get("max_length"),
        }


def _label_tokens(loaded: LoadedModel, details: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """The labels' tokens under letter scoring; none otherwise."""
    if details.get("scoring") != "letter":
        return ()
    prompt = prompt_of_fit(details)
    scorer = LetterScorer(loaded.tokenizer, replace(own_task("labels", (), ()), prompt=prompt))
    label_tokens = []
    for label, token in zip(prompt.labels, scorer.tokens, strict=False):
        text = loaded.tokenizer.decode([token])
        label_tokens.append({"label": label, "token_id": token, "text": text})
    return tuple(label_tokens)


def taught_by(folder: Path) -> str | None:
    """The digest of the posterior that a student was distilled from; None if it is no student."""
    if not (folder / DETAILS).is_file():
        return None
    teacher = read_details(folder).get("facts", {}).get("teacher") or {}
    return teacher.get("digest")


def student_beside(source: Source) -> Path | None:
    """The student that a calibration names, or the only one in the folder or beside it.

    Raises:
        Refusal: if there are several.
    """
    place = source.place
    if place is None or source.digest is None:
        return None
    if source.way.student is not None:
        folder = Path(os.path.normpath(place / source.way.student))
        return folder if folder.is_dir() else None
    near = [path for path in (*place.iterdir(), *place.resolve().parent.iterdir()) if path.is_dir()]
    students = [path for path in sorted(near) if _is_student_of(path, source.digest)]
    if len(students) > 1:
        got = [path.name for path in students]
        raise Refusal(
            f"which student goes with the draws is not clear: got {got}, expected one; give "
            "--student"
        )
    return students[0] if students else None


def _is_student_of(folder: Path, digest: str) -> bool:
    try:
        return taught_by(folder) == digest
    except (Refusal, OSError):
        return False
