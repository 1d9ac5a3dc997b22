"""Saves and loads a posterior as a stock PEFT adapter (the mean) with two files beside it, and exports draws."""

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import bayestune
from bayestune.adapters import ADAPTER, PREFIX, adapter_weights, gaussian_layers, slots
from bayestune.forward import ClassLogits
from bayestune.posteriors.gaussian import Gaussian
from bayestune.posteriors.kinds import KINDS
from bayestune.posteriors.mixture import Mixture
from bayestune.posteriors.point import Point
from bayestune.posteriors.posterior import Posterior, Saved

FORMAT = 1
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
TENSORS, DETAILS = "posterior.safetensors", "posterior.json"


class PosteriorError(ValueError):
    """A folder is not a posterior that can be loaded on this model."""


def mean_digest(model: nn.Module, adapter: str = ADAPTER) -> str:
    """A hash of the adapter's A and B, so that a standard deviation is never put beside another mean."""
    digest = hashlib.sha256()
    for name, weight in sorted(adapter_weights(model, adapter).items()):
        digest.update(name.encode())
        digest.update(weight.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_posterior(
    posterior: Posterior | nn.Module, folder: Path, details: Mapping[str, Any] | None = None
) -> Path:
    """Writes a posterior: a stock LoRA folder of the mean, `posterior.safetensors` and `posterior.json`.

    Each file is written elsewhere and moved into place, `posterior.json` last, so a folder that has it is whole. A
    mixture has no mean: its members are such folders, `member-0` and so on, beside its `posterior.json`.

    Args:
        posterior: what `fit` returned, or a PEFT model, converted by `bayesify` or not.
        folder: made if it is not there.
        details: what else to keep in `posterior.json`: method, task, base model.

    Returns:
        The folder.
    """
    if isinstance(posterior, nn.Module):
        posterior = (Gaussian if gaussian_layers(posterior) else Point)(posterior, unbound)
    folder.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "format": FORMAT,
        "bayestune": bayestune.__version__,
        "posterior": posterior.kind,
    }
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as name:
        scratch = Path(name)
        if isinstance(posterior, Mixture):
            record["members"] = [f"member-{i}" for i in range(len(posterior.members))]
            for member, own in zip(posterior.members, record["members"], strict=True):
                save_posterior(member, folder / own, details)
        else:
            tensors, facts = posterior.state()
            _save_adapter(posterior.model, scratch, {}, posterior.adapter)
            save_file(
                {n: v.detach().cpu().contiguous() for n, v in tensors.items()}, scratch / TENSORS
            )
            record |= {
                "facts": facts,
                "mean_digest": mean_digest(posterior.model, posterior.adapter),
            }
        text = json.dumps({**record, **(details or {})}, indent=2, default=str) + "\n"
        (scratch / DETAILS).write_text(text, encoding="utf-8")
        for file in (*ADAPTER_FILES, TENSORS, DETAILS):
            if (scratch / file).exists():
                (scratch / file).replace(folder / file)
    return folder


def export_draw(model: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> Path:
    """Writes one draw as a plain LoRA adapter folder, which any LoRA server can load.

    Args:
        model: the PEFT model of the posterior.
        weights: the draw by slot name, as a posterior's `draw` gives it: A (r, k), B (d, r); the rest is the mean's.
        folder: made if it is not there.

    Returns:
        The folder.

    Raises:
        ValueError: if a name is not a slot of the model.
    """
    if unknown := sorted(set(weights) - set(slots(model))):
        raise ValueError(
            f"a draw of another model: got the slots {unknown[:3]}, expected slots of this adapter"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as scratch:
        _save_adapter(model, Path(scratch), weights)
        for name in ADAPTER_FILES:
            (Path(scratch) / name).replace(folder / name)
    return folder


def _save_adapter(
    model: nn.Module, folder: Path, weights: Mapping[str, Tensor], adapter: str = ADAPTER
) -> None:
    own = {
        f"{PREFIX}{name}.{adapter}." for name in slots(model, adapter)
    }  # what else is in a slot is no stock LoRA
    state = {
        name: value
        for name, value in model.state_dict().items()
        if name.endswith(".weight") or not any(name.startswith(slot) for slot in own)
    }
    for slot, weight in weights.items():
        name = f"{PREFIX}{slot}.{adapter}.weight"
        state[name] = weight.to(state[name].dtype)
    save: Any = model.save_pretrained
    save(folder, state_dict=state, save_embedding_layers=False, selected_adapters=[adapter])
    if adapter != ADAPTER:  # PEFT writes it one folder deeper
        for file in ADAPTER_FILES:
            (folder / adapter / file).replace(folder / file)


def read_details(folder: Path) -> dict[str, Any]:
    """What `posterior.json` says.

    Raises:
        PosteriorError: if the folder is no posterior, its file is cut off, or it is of a later format.
    """
    path = folder / DETAILS
    if not path.is_file():
        what = "a plain LoRA adapter" if (folder / ADAPTER_FILES[0]).is_file() else "no adapter"
        raise PosteriorError(
            f"{folder} is no posterior: got {what} without {DETAILS}, expected a folder of `fit`"
        )
    try:
        details = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise PosteriorError(
            f"{path} is damaged or cut off ({error}); restore it or fit again"
        ) from None
    if details.get("format") != FORMAT:
        raise PosteriorError(
            f"{path} has format {details.get('format')}, expected {FORMAT}: it was written by bayestune "
            f"{details.get('bayestune')}; upgrade bayestune"
        )
    return details


def unbound(*_: Any) -> Tensor:
    """Stands for the scorer of a posterior that was loaded without one."""
    raise ValueError(
        "the posterior has no scorer: got load_posterior(base, folder), expected a scorer as well"
    )


def load_posterior(
    base: nn.Module, folder: Path, score: ClassLogits = unbound, *, trainable: bool = False
) -> Posterior:
    """Loads a posterior on its base model; its draws are the saved one's, bit for bit.

    Args:
        base: the base model, without adapters.
        folder: what `save_posterior` wrote.
        score: maps (model, batch) to class logits (N, C); without one the posterior's `logits` cannot be asked for.
        trainable: whether training shall go on.

    Returns:
        The posterior; its `model` is the PEFT model. `read_details(folder)` says what else was kept.

    Raises:
        PosteriorError: if the folder is no posterior, a file is cut off, or it is of another model, rank or mean.
    """
    members = read_details(folder).get("members")
    if members is None:
        return _load(base, folder, score, ADAPTER, trainable)
    return Mixture(
        load_members(base, [folder / member for member in members], score, trainable=trainable)
    )


def load_adapter(base: nn.Module, folder: Path, score: ClassLogits = unbound) -> Point:
    """Any LoRA adapter folder as a point, whoever trained it.

    Args:
        base: the base model, without adapters.
        folder: with `adapter_config.json` and the weights.
        score: as for `load_posterior`.

    Raises:
        PosteriorError: if the folder holds no adapter, or it does not fit the model.
    """
    if not (folder / ADAPTER_FILES[0]).is_file():
        raise PosteriorError(
            f"{folder} is no LoRA adapter: got no {ADAPTER_FILES[0]}, expected PEFT's folder"
        )
    return Point(_load_adapter(base, folder, {}, ADAPTER, trainable=False).eval(), score)


def base_name(folder: Path) -> str | None:
    """The name of the base model that an adapter's configuration gives."""
    path = folder / ADAPTER_FILES[0]
    return (
        json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
        if path.is_file()
        else None
    )


def load_members(
    base: nn.Module,
    folders: Sequence[Path],
    score: ClassLogits = unbound,
    *,
    trainable: bool = False,
) -> list[Posterior]:
    """Loads several posteriors on one base model, each under an adapter name of its own; the first one is active.

    Args:
        base: the base model, without adapters.
        folders: what `save_posterior` wrote, one for each.
        score: as for `load_posterior`.
        trainable: whether training shall go on.

    Raises:
        PosteriorError: as `load_posterior`.
    """
    model, loaded = base, []
    for i, folder in enumerate(folders):
        loaded.append(_load(model, folder, score, f"member{i}" if i else ADAPTER, trainable))
        model = loaded[0].model
    return loaded


def _load(
    base: nn.Module, folder: Path, score: ClassLogits, adapter: str, trainable: bool
) -> Posterior:
    details = read_details(folder)
    if details["posterior"] not in KINDS:
        raise PosteriorError(
            f"{folder} has the form {details['posterior']!r}, expected one of {sorted(KINDS)}"
        )
    model = _load_adapter(base, folder, details, adapter, trainable).eval()
    if mean_digest(model, adapter) != details["mean_digest"]:
        raise PosteriorError(
            f"the adapter in {folder} is not the one its {DETAILS} was written for, or of another model"
        )
    try:
        tensors = load_file(folder / TENSORS)
    except (SafetensorError, OSError) as error:
        raise PosteriorError(
            f"{folder / TENSORS} is missing, damaged or cut off ({error}); fit again"
        ) from error
    try:
        posterior = KINDS[details["posterior"]].restore(
            Saved(model, score, tensors, details["facts"], adapter)
        )
    except ValueError as error:
        raise PosteriorError(f"{folder / TENSORS} does not fit: it is {error}") from error
    model.eval()
    return posterior


def _load_adapter(
    base: nn.Module, folder: Path, details: Mapping[str, Any], adapter: str, trainable: bool
) -> PeftModel:
    try:
        if not isinstance(base, PeftModel):
            return PeftModel.from_pretrained(
                base, folder, adapter_name=adapter, is_trainable=trainable
            )  # type: ignore[arg-type]
        base.load_adapter(str(folder), adapter, is_trainable=trainable)
    except (RuntimeError, ValueError, SafetensorError) as error:
        raise PosteriorError(
            f"the adapter in {folder} does not fit this model or is damaged; its base is "
            f"{details.get('base_model', 'not recorded')} ({str(error).splitlines()[0]})"
        ) from error
    return base
