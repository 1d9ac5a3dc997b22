"""Saves a posterior as a stock PEFT adapter (the mean) with two files beside it, and loads it."""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import bayestune
from bayestune.adapters import ADAPTER, PREFIX, GaussianLinear, Slots
from bayestune.errors import Refusal
from bayestune.forward import ClassLogits
from bayestune.posteriors.gaussian import Gaussian
from bayestune.posteriors.mixture import Mixture
from bayestune.posteriors.point import Point
from bayestune.posteriors.posterior import KINDS, Posterior, Saved
from bayestune.posteriors.tempered import Tempered

FORMAT = 1
CONFIG = "adapter_config.json"
TENSORS = "posterior.safetensors"
DETAILS = "posterior.json"
_FILES = (CONFIG, "adapter_model.safetensors", TENSORS, DETAILS)


class PosteriorError(Refusal):
    """A folder is not a posterior that can be loaded on this model."""


def _mean_digest(slots: Slots) -> str:
    """A hash of A and B, so that a standard deviation is never put beside another mean."""
    digest = hashlib.sha256()
    for name, weight in sorted(slots.weights().items()):
        digest.update(name.encode())
        digest.update(weight.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A scratch folder, whose files are moved to the folder once all are written."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as scratch:
        yield Path(scratch)
        _move(Path(scratch), folder)


def _move(scratch: Path, folder: Path) -> None:
    for name in _FILES:
        if (scratch / name).exists():
            (scratch / name).replace(folder / name)


def save_posterior(
    posterior: Posterior | nn.Module, folder: Path, details: Mapping[str, Any] | None = None
) -> Path:
    """Writes a stock LoRA folder of the mean, with `posterior.safetensors` and `posterior.json`.

    Each file is written elsewhere and moved into place, `posterior.json` last, so a folder that has
    it is whole. A mixture has no mean: its members are such folders beside its `posterior.json`.

    Args:
        posterior: what `fit` returned, or a PEFT model, converted by `bayesify` or not, whose
            active adapter is saved.
        folder: made if it is not there, and returned.
        details: what else to keep in `posterior.json`: method, task, base model.
    """
    if isinstance(posterior, nn.Module):
        stochastic = Slots(posterior).of_kind(GaussianLinear)
        posterior = (Gaussian if stochastic else Point)(posterior, unbound)
    record: dict[str, Any] = {"format": FORMAT, "bayestune": bayestune.__version__}
    record["posterior"] = posterior.kind
    if classes := getattr(posterior.scorer, "class_names", None):  # of a classification head
        record["class_names"] = list(classes)
    with replacing(folder) as scratch:
        if isinstance(posterior, Mixture):
            record["members"] = [f"member-{i}" for i in range(len(posterior.members))]
            for member, name in zip(posterior.members, record["members"], strict=True):
                save_posterior(member, folder / name, details)
        elif isinstance(posterior, Tempered) and isinstance(posterior.base, Mixture):
            record |= {"base": "base", "facts": {"temperature": posterior.temperature}}
            save_posterior(posterior.base, folder / "base", details)
        else:
            slots = Slots(posterior.model, posterior.adapter)
            tensors, record["facts"] = posterior.state()
            record["mean_digest"] = _mean_digest(slots)
            save_adapter(slots, scratch)
            plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
            save_file(plain, scratch / TENSORS)
        text = json.dumps({**record, **(details or {})}, indent=2, default=str) + "\n"
        (scratch / DETAILS).write_text(text, encoding="utf-8")
    return folder


def save_adapter(slots: Slots, folder: Path, draw: Mapping[str, Tensor] | None = None) -> None:
    """Writes the adapter as PEFT does, its slots' weights alone, some of them replaced."""
    own = tuple(f"{PREFIX}{name}.{slots.adapter}." for name in slots.modules())
    state = {}
    for name, value in slots.model.state_dict().items():
        if name.endswith(".weight") or not name.startswith(own):
            state[name] = value
    for slot, weight in (draw or {}).items():
        name = f"{PREFIX}{slot}.{slots.adapter}.weight"
        state[name] = weight.to(state[name].dtype)
    save: Any = slots.model.save_pretrained
    save(folder, state_dict=state, save_embedding_layers=False, selected_adapters=[slots.adapter])
    if slots.adapter != ADAPTER:  # PEFT writes it one folder deeper
        _move(folder / slots.adapter, folder)


def read_details(folder: Path) -> dict[str, Any]:
    """What `posterior.json` says.

    Raises:
        PosteriorError: if it is not there, cut off, or of a later format.
    """
    path = folder / DETAILS
    if not path.is_file():
        what = "a plain LoRA adapter" if (folder / CONFIG).is_file() else "no adapter"
        raise PosteriorError(
            f"{folder} is not a posterior: got {what} without {DETAILS}, expected a folder of `fit`"
        )
    try:
        details = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        message = f"{path} is damaged or cut off ({error}); restore it or fit again"
        raise PosteriorError(message) from None
    if details.get("format") != FORMAT:
        raise PosteriorError(
            f"{path} has format {details.get('format')}, expected {FORMAT}: it was written by "
            f"bayestune {details.get('bayestune')}; upgrade bayestune"
        )
    return details


def base_name(folder: Path) -> str | None:
    """The name of the base model in an adapter's configuration."""
    path = folder / CONFIG
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return config.get("base_model_name_or_path")


def unbound(*_: Any) -> Tensor:
    """The scorer of a posterior that was loaded without one."""
    raise Refusal(
        "the posterior has no scorer: got load_posterior(base, folder), expected a scorer as well"
    )


def load_posterior(
    base: nn.Module, folder: Path, scorer: ClassLogits = unbound, *, trainable: bool = False
) -> Posterior:
    """Loads a posterior on its base model; its draws are the saved one's, bit for bit.

    Args:
        base: the base model, without adapters; the posterior's `model` is the PEFT model around it.
        folder: what `save_posterior` wrote; `read_details` says what else was kept.
        scorer: maps (model, batch) to class logits (N, C); the posterior's `logits` need it.
        trainable: whether training shall go on.

    Raises:
        PosteriorError: if the folder is not a posterior, a file is cut off, or it is of another
            model, rank or mean.
    """
    details = read_details(folder)
    _refuse_other_classes(folder, details.get("class_names"), scorer)
    if "base" in details:
        mixture = load_posterior(base, folder / details["base"], scorer, trainable=trainable)
        return Tempered(mixture, **details["facts"])
    members = details.get("members")
    folders = [folder] if members is None else [folder / member for member in members]
    loaded = load_members(base, folders, scorer, trainable)
    return loaded[0] if members is None else Mixture(loaded)


def _refuse_other_classes(folder: Path, saved: list[str] | None, scorer: ClassLogits) -> None:
    """Refuses a scorer whose head has its classes in another order than the saved one."""
    own = getattr(scorer, "class_names", None)
    if saved and own and list(own) != saved:
        raise PosteriorError(
            f"{folder} is of a head with other classes: got {list(own)}, expected {saved} in this "
            "order; give the rows' options in it"
        )


def load_members(
    base: nn.Module, folders: Sequence[Path], scorer: ClassLogits, trainable: bool = False
) -> list[Posterior]:
    """Loads several posteriors, each under its own adapter, the first active: `load_posterior`."""
    model = base
    loaded: list[Posterior] = []
    for i, folder in enumerate(folders):
        name = f"member{i}" if i else ADAPTER
        loaded.append(_load(model, folder, scorer, name, trainable))
        model = loaded[0].model
    return loaded


def load_adapter(
    base: nn.Module, folder: Path, scorer: ClassLogits = unbound, *, trainable: bool = False
) -> Point:
    """Loads any LoRA adapter folder as a point, whoever trained it; see `load_posterior`.

    Raises:
        PosteriorError: if the folder holds no adapter, or it does not fit the model.
    """
    if not (folder / CONFIG).is_file():
        raise PosteriorError(f"{folder} is not a LoRA adapter: got no {CONFIG}, expected PEFT's")
    return Point(_load_adapter(base, folder, {}, ADAPTER, trainable).eval(), scorer)


def _load(
    base: nn.Module, folder: Path, scorer: ClassLogits, adapter: str, trainable: bool
) -> Posterior:
    details = read_details(folder)
    kind = details["posterior"]
    if kind not in KINDS:
        raise PosteriorError(
            f"{folder} is of the family {kind!r}, expected one of {sorted(KINDS)}; upgrade "
            "bayestune"
        )
    model = _load_adapter(base, folder, details, adapter, trainable).eval()
    if _mean_digest(Slots(model, adapter)) != details["mean_digest"]:
        raise PosteriorError(
            f"the adapter in {folder} is not the one its {DETAILS} was written for, or it is of "
            "another model; restore the folder or fit again"
        )
    try:
        tensors = load_file(folder / TENSORS)
    except (SafetensorError, OSError) as error:
        message = f"{folder / TENSORS} is missing, damaged or cut off ({error}); fit again"
        raise PosteriorError(message) from error
    try:
        posterior = KINDS[kind].restore(Saved(model, scorer, tensors, details["facts"], adapter))
    except ValueError as error:
        raise PosteriorError(f"{folder / TENSORS} does not fit: it is {error}") from error
    model.eval()
    return posterior


def _load_adapter(
    base: nn.Module, folder: Path, details: Mapping[str, Any], adapter: str, trainable: bool
) -> PeftModel:
    make: Any = PeftModel.from_pretrained
    try:
        if not isinstance(base, PeftModel):
            return make(base, folder, adapter_name=adapter, is_trainable=trainable)
        base.load_adapter(str(folder), adapter, is_trainable=trainable)
    except (RuntimeError, ValueError, SafetensorError) as error:
        raise PosteriorError(
            f"the adapter in {folder} does not fit this model or is damaged; its base is "
            f"{details.get('base_model', 'not recorded')} ({str(error).splitlines()[0]})"
        ) from error
    return base
