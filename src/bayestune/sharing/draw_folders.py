"""Writes a posterior as plain LoRA folders, which any LoRA server loads: mean, student, draws."""

import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from bayestune.adapters import CONFIG, WEIGHTS
from bayestune.errors import NUMBER, Refusal, check_fields
from bayestune.posteriors import (
    AdapterPosterior,
    Mixture,
    Posterior,
    Tempered,
    artefact_folder,
    count_for,
    export_draw,
)
from bayestune.runtime import follow_umask
from bayestune.session import widened
from bayestune.sharing.manifest import check_target, lora_facts, write_manifest, written_whole
from bayestune.sharing.source import Source, student_beside, taught_by
from bayestune.sharing.vllm_rules import VERSION, vllm_findings

logger = logging.getLogger(__name__)

Server = Literal["any", "vllm"]
_DRAWS_ARE = {
    "dropout": "passes with dropout masks",
    "token_noise": "passes with noise for each token",
    "linearised": "logits around the mean's",
}
_AVERAGE = "p(y | x) = 1/S Σ_s softmax(f_s(x) / T), f_s(x) the logits of the classes"


@dataclass(frozen=True)
class ExportOptions:
    """What is exported of a posterior, and for whom.

    Args:
        draws: how many; left out, as calibrated, or else 10; 0 for the mean alone.
        draw_seed: of the draws; left out, as calibrated, or else 0.
        student: a folder of `distil`, whose adapter goes with them; left out, the one that the
            calibration names, or that lies in the posterior's folder or beside it.
        name: what servers call the adapters, as NAME-draw-0; left out, the posterior's folder.
        server: whose rules must hold: "vllm" refuses what vLLM does not load, "any" says it.
    """

    draws: int | None = None
    draw_seed: int | None = None
    student: Path | None = None
    name: str | None = None
    server: Server = "any"

    def __post_init__(self) -> None:
        check_fields(self, draws=NUMBER, draw_seed=NUMBER)
        if self.name is not None and (not self.name or set(self.name) & set("=/, \t\n")):
            raise Refusal(
                f"got name={self.name!r}, expected one that a server's URL and command line take; "
                "leave out spaces, commas, slashes and ="
            )


def export(
    posterior: Posterior | str | PathLike[str],
    to: str | PathLike[str],
    *,
    model: str | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """Writes a posterior as plain LoRA folders with a manifest: p(y | x) = 1/S Σ_s p(y | draw s).

    `mean`, `student` and `draw-0` … hold an `adapter_config.json` and the weights, as PEFT writes
    them; `manifest.json` says whose they are, the seed, what to average, and each file's SHA-256.

    Args:
        posterior: a posterior; or a folder, or Hub id, of `fit`'s output or of a LoRA adapter.
        to: the folder to write to; made if it is not there.
        model: the name of the base model, if it has moved since the fit.
        overwrite: whether an earlier export there is replaced.
        options: fields of `ExportOptions`: draws, draw_seed, student, name, server.

    Returns:
        The folder.

    Raises:
        Refusal: if the posterior's draws are not adapters, or the server does not load them.
    """
    chosen = ExportOptions(**options)
    target = Path(to).expanduser()
    check_target(target, overwrite)
    source = Source.of(posterior, model)
    of_adapters, temperature = _of_adapters(source)
    calibrated = source.way
    seed = calibrated.draw_seed if chosen.draw_seed is None else chosen.draw_seed
    wanted = (calibrated.draws or 10) if chosen.draws is None else chosen.draws
    count = count_for(of_adapters, wanted)
    if count != wanted:
        logger.warning("%d draws asked for, and the posterior has %d", wanted, count)
    student = _student(source, chosen)
    name = chosen.name or source.name
    factor = source.factor(count, seed)
    with written_whole(target) as scratch, widened(source.posterior, factor):
        roles = []
        warned: set[str] = set()
        for role in _write(of_adapters, student, scratch, count, seed):
            _check(scratch / role, chosen.server, warned)
            roles.append(role)
        draws = {"seed": seed, "indices": list(range(count))}
        facts = source.facts() | {"draws": draws if factor == 1 else draws | {"factor": factor}}
        facts |= _averaging(source, temperature, count, seed)
        facts["adapters"] = [{"name": f"{name}-{role}", "folder": role} for role in roles]
        write_manifest(scratch, facts | {"lora": lora_facts(scratch / roles[0])})
    return target


def _averaging(source: Source, temperature: float, count: int, seed: int) -> dict[str, Any]:
    """How the draws are averaged, and the temperature of the average, the mean and the student.

    A temperature is that of a `Tempered` posterior, which a student has learnt already, times the
    calibration's.
    """
    temperatures = {}
    for role in ("average", "mean", "student"):
        own = 1.0 if role == "student" else temperature
        temperatures[role] = own * source.calibrated_temperature(role, count, seed)
    average: dict[str, Any] = {"of": "probabilities", "formula": _AVERAGE}
    # whether these are all the draws there are: mutual information then has no factor S/(S − 1)
    average["exact"] = source.posterior.atoms is not None
    return {"average": average, "temperature": temperatures}


def _of_adapters(source: Source) -> tuple[AdapterPosterior | Mixture, float]:
    """The posterior without the `Tempered` ones around it, and the product of their temperatures.

    Raises:
        Refusal: if its draws are not adapters.
    """
    posterior = source.posterior
    temperature = 1.0
    while isinstance(posterior, Tempered):
        temperature *= posterior.temperature
        posterior = posterior.base
    members = posterior.members if isinstance(posterior, Mixture) else [posterior]
    for member in members:
        if not isinstance(member, AdapterPosterior):
            kind = _DRAWS_ARE.get(member.kind, f"those of a {type(member).__name__}")
            raise Refusal(
                f"its draws are not adapters: got {source.described} ({type(member).__name__}), "
                f"whose draws are {kind}, expected a posterior such as blob's, tfb's or swag's; "
                "train a student of it with `bayestune distil`, and export or serve that"
            )
    assert isinstance(posterior, AdapterPosterior | Mixture)
    return posterior, temperature


def _student(source: Source, options: ExportOptions) -> Path | None:
    """The folder of the student that goes with the draws; None if there is none."""
    if options.student is None:
        return student_beside(source)
    folder = artefact_folder(options.student)
    if source.digest and taught_by(folder) != source.digest:
        message = "%s does not say that it was distilled from this very posterior, %s"
        logger.warning(message, folder, source.described)
    return folder


def _write(
    posterior: AdapterPosterior | Mixture, student: Path | None, to: Path, count: int, seed: int
) -> Iterator[str]:
    """Writes the adapters one by one; yields the name of each one's folder once it is written."""
    if posterior.has_mean:
        first = posterior.members[0] if isinstance(posterior, Mixture) else posterior
        export_draw(first, {}, to / "mean")
        yield "mean"
    if student is not None:
        (to / "student").mkdir()
        for name in (CONFIG, *WEIGHTS):
            if (student / name).is_file():
                shutil.copyfile(student / name, to / "student" / name)
        follow_umask(to / "student")
        yield "student"
    for index in range(count):
        export_draw(posterior, index, to / f"draw-{index}", seed)
        yield f"draw-{index}"


def _check(folder: Path, server: Server, warned: set[str]) -> None:
    """Refuses an adapter that the chosen server does not load; otherwise warns, once a finding."""
    for finding in vllm_findings(folder):
        text = str(finding)
        if finding.refused and server == "vllm":
            raise Refusal(f"vLLM does not load {folder.name}: {text}")
        if text not in warned:
            warned.add(text)
            verb = "does not load" if finding.refused else "may read otherwise"
            logger.warning("vLLM %s %s %s: %s", VERSION, verb, folder.name, text)
