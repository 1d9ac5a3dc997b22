"""The artefacts that a service answers with: several on one base, opened again when they change."""

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from bayestune.data import own_task
from bayestune.decisions import Calibration
from bayestune.errors import Refusal
from bayestune.forward import Draws
from bayestune.models import LoadedModel
from bayestune.posteriors import Posterior, artefact_folder, posterior_digest
from bayestune.session import (
    CalibratedPredictor,
    Fit,
    PredictionOptions,
    Session,
    TaskOptions,
    classes_of_fit,
    details_of,
    load_way,
    open_model,
    prompt_of_fit,
    read_calibration,
    read_options_of_fit,
)

logger = logging.getLogger(__name__)

_KEPT = (".json", ".safetensors", ".bin")  # of an artefact's files: what `stamp` looks at
_MOST_WAYS = 64  # numbers of draws and seeds whose predictors are remembered
_BESIDE = "kept_beside"  # weights of the base itself that a fit has changed
Stamp = frozenset[tuple[str, int, int]]


@dataclass(frozen=True, eq=False)
class Served:
    """An artefact that answers: as calibrated, and with any number of draws.

    Args:
        name: by which requests ask for it.
        place: its folder.
        digest: of what it predicts with and of its calibration, shortened; answers carry it.
        calibrated: predicts and decides as calibrated.
        fit: the artefact itself, for other numbers of draws.
    """

    name: str
    place: Path
    digest: str
    calibrated: CalibratedPredictor
    fit: Fit

    @property
    def session(self) -> Session:
        """How its rows are put."""
        return self.calibrated.session

    @property
    def options(self) -> tuple[str, ...]:
        """Those that all rows of the fit had, for rows without any; none if they differed."""
        return classes_of_fit(self.fit.details) or ()

    @property
    def is_chat(self) -> bool:
        """Whether its prompt is the end of a conversation."""
        return prompt_of_fit(self.fit.details).chat

    @property
    def columns(self) -> dict[str, str]:
        """The names that the files of the fit had for some fields, by these."""
        return dict(read_options_of_fit(self.fit.details).usual_columns)

    @property
    def calibration(self) -> Calibration | None:
        """That of the artefact."""
        return self.calibrated.calibration

    @property
    def posterior(self) -> Posterior:
        """The artefact's own, which a student stands in for."""
        return self.fit.posterior

    def with_draws(self, draws: int | None = None, seed: int | None = None) -> CalibratedPredictor:
        """Predicts with so many draws; decides if that is what was calibrated.

        Raises:
            Refusal: if the mean is asked for, by 0, and there is none.
        """
        way = self.calibrated.way
        if draws is None and seed is None:
            return self.calibrated
        draws = way.draws if draws is None else draws
        seed = way.draw_seed if seed is None else seed
        plain = way.student is None and way.band is None
        if plain and (draws, seed) == (way.draws, way.draw_seed):
            return self.calibrated
        if draws == 0 and not self.posterior.has_mean:
            got = f"draws=0, which asks for the mean of a {type(self.posterior).__name__}"
            raise Refusal(f"got {got}; expected 1 or more: it has none; ask for draws")
        return self.plainly(draws, seed)

    def plainly(self, draws: int, seed: int) -> CalibratedPredictor:
        """Predicts with the artefact's own draws, whatever its calibration says.

        There is one object for each number of draws, so that rows of unlike requests share a pass.
        """
        key = (draws, seed)
        if len(self._others) > _MOST_WAYS:
            self._others.clear()
        if key not in self._others:
            way = PredictionOptions(draws, seed, self.fit.bf16)
            self._others[key] = CalibratedPredictor(self.session, self.fit, way)
        return self._others[key]

    @cached_property
    def _others(self) -> dict[tuple[int, int], CalibratedPredictor]:
        return {}

    def check_cascade(self) -> None:
        """Refuses an artefact whose calibration is not of a cascade."""
        if self.calibrated.way.band is None:
            variant = "no calibration" if self.calibration is None else self.calibration.variant
            raise Refusal(
                f"got --cascade for {self.name}, of {variant!r}; expected a calibration that kept "
                "the cascade; run `bayestune calibrate` with --cascade 0.3, or leave it out"
            )


class Bases:
    """Base models by name, precision and head: their weights are in memory once."""

    def __init__(self, model: str | None = None) -> None:
        self._model = model
        self._loaded: dict[tuple[Any, ...], LoadedModel] = {}

    def beside(self, details: dict[str, Any]) -> LoadedModel:
        """A fit's base with modules of its own for one more adapter."""
        key = (self._model or details["base_model"], details["dtype"], details["classes"])
        if key not in self._loaded:
            self._loaded[key] = open_model(*key)
        return self._loaded[key].again(shared=not details.get(_BESIDE))


class ArtefactStore:
    """Artefacts by name, each opened anew when its folder changes."""

    def __init__(self, folders: Sequence[Path], model: str | None = None) -> None:
        self._bases = Bases(model)
        self._stamps: dict[str, Stamp] = {}
        self._served: dict[str, Served] = {}
        self._ended = threading.Event()
        self.reloads: dict[str, int] = {}
        places = {name_of(folder): folder for folder in folders}
        if len(places) < len(folders) or not places:
            got = [str(folder) for folder in folders]
            raise Refusal(f"got the folders {got}; expected unlike names; rename one")
        for name, folder in places.items():
            self._put(name, folder)

    @property
    def names(self) -> list[str]:
        """Of the artefacts, the first one the default."""
        return list(self._served)

    def get(self, name: str | None = None) -> Served:
        """The artefact of a name, by default the first.

        Raises:
            KeyError: if there is none.
        """
        return self._served[self.names[0] if name is None else name]

    def all(self) -> list[Served]:
        """The artefacts."""
        return list(self._served.values())

    def watch(self, seconds: float) -> None:
        """Looks after changes every so many seconds, in a thread of its own; 0 for never."""
        if seconds > 0:
            threading.Thread(target=self._watch, args=(seconds,), daemon=True).start()

    def close(self) -> None:
        """Ends the watch."""
        self._ended.set()

    def _watch(self, seconds: float) -> None:
        while not self._ended.wait(seconds):
            self.renew()

    def renew(self) -> list[str]:
        """Opens artefacts anew whose files have changed; the names of those that were.

        One that cannot be opened, such as while it is written, goes on as it was.
        """
        renewed = []
        for name, served in list(self._served.items()):
            now = stamp(served.place)
            if now == self._stamps[name] or not now:
                continue
            try:
                self._put(name, served.place)
            except Exception as problem:  # whatever half-written files do to the libraries
                self._stamps[name] = now  # told once; the next change is looked at again
                logger.warning("%s is served as it was: its folder changed: %s", name, problem)
                continue
            self.reloads[name] = self.reloads.get(name, 0) + 1
            renewed.append(name)
            logger.info("%s was opened anew", name)
        return renewed

    def _put(self, name: str, folder: Path) -> None:
        before = stamp(folder)
        served = opened(name, folder, self._bases)
        if stamp(folder) != before:
            raise Refusal(f"got {folder} while it is written; expected it whole; try again")
        self._served[name] = served
        self._stamps[name] = before


def opened(name: str, folder: Path, bases: Bases) -> Served:
    """Opens an artefact for the rows of requests.

    Args:
        name: by which requests ask for it.
        folder: of `fit`, or a calibrated adapter's.
        bases: the base models that are loaded already.
    """
    place = artefact_folder(folder)
    details = details_of(place)
    calibration = read_calibration(place)
    session = _session(details, bases)
    fit = session.load(place)
    way = PredictionOptions(Draws().count, bf16=fit.bf16)
    if calibration:
        way = PredictionOptions.of(calibration.settings)
    of_way = fit
    if way.student is not None:
        with_student = replace(_session(details, bases), scorer=session.scorer)
        of_way = load_way(with_student, place, way)
    digest = posterior_digest(place)[:12]
    if calibration is not None:
        digest += f"-{calibration.rows[:6]}-{calibration.date}"
    predictor = CalibratedPredictor(session, of_way, way, calibration)
    return Served(name, folder, digest, predictor, fit)


def _session(details: dict[str, Any], bases: Bases) -> Session:
    """A session without rows, on modules of its own."""
    nothing = own_task("requests", (), ())
    session = Session.as_fitted(details, nothing, TaskOptions(), bases.beside(details))
    return session.quietly()


def name_of(folder: Path) -> str:
    """The name of a folder's artefact: the folder's own."""
    return folder.expanduser().resolve().name


def stamp(folder: Path) -> Stamp:
    """The files of an artefact with their times and sizes; empty while it is not there."""
    files = []
    try:
        for path in sorted(folder.rglob("*")):
            if path.suffix in _KEPT and "checkpoints" not in path.parts:
                stat = path.stat()
                files.append((str(path), stat.st_mtime_ns, stat.st_size))
    except OSError:  # a file went away meanwhile
        return frozenset()
    return frozenset(files)
