"""Loads a posterior on its base model, or any LoRA adapter as a point."""

import json
import logging
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from bayestune.adapters import (
    ADAPTER,
    CONFIG,
    DETAILS,
    FORMAT,
    PREFIX,
    TENSORS,
    WEIGHTS,
    Slots,
    differs,
    input_embedding,
    mean_digest,
    old_names_unsaid,
    precision_of,
)
from bayestune.forward import ClassLogits
from bayestune.posteriors.folder_of import PosteriorError, folder_of, read_details
from bayestune.posteriors.mixture import Mixture
from bayestune.posteriors.point import Point
from bayestune.posteriors.posterior import KINDS, Posterior, Saved, unbound
from bayestune.posteriors.tempered import Tempered

logger = logging.getLogger(__name__)

Folder = str | PathLike[str]


def base_name(folder: Folder) -> str | None:
    """The name of the base model in an adapter's configuration; None if there is none."""
    return _config(Path(folder).expanduser()).get("base_model_name_or_path")


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def load_posterior(
    base: nn.Module,
    folder: Folder,
    scorer: ClassLogits = unbound,
    *,
    trainable: bool = False,
    other_base: bool = False,
) -> Posterior:
    """Loads a posterior on its base model; its draws are the saved one's, bit for bit.

    Args:
        base: the base model, without adapters; the posterior's `model` is the PEFT model around it.
            If the folder holds the embeddings of a resized vocabulary, it is resized.
        folder: what `save_posterior` wrote, or `save_pretrained` of a model that `bayesify` has
            converted, as a Trainer's checkpoints and `save_model` do; or such a folder on the Hub
            by its id, "owner/name" or "owner/name@revision". See also `read_details`.
        scorer: maps (model, batch) to class logits (N, C); the posterior's `logits` need it.
        trainable: whether the adapter's parameters require gradients, to train on.
        other_base: whether the base may have other weights than the one that was fitted on.

    Raises:
        PosteriorError: if the folder is not a posterior, a file is cut off, or it is of another
            model, rank or mean.
    """
    place = folder_of(folder)
    details = _details(place)
    _refuse_other_classes(place, details.get("class_names"), scorer)
    options = {"trainable": trainable, "other_base": other_base}
    if "base" in details:
        mixture = load_posterior(base, place / details["base"], scorer, **options)
        return Tempered(mixture, **details["facts"])
    members = details.get("members")
    folders = [place] if members is None else [place / member for member in members]
    loaded = load_members(base, folders, scorer, **options)
    return loaded[0] if members is None else Mixture(loaded)


def _refuse_other_classes(folder: Path, saved: list[str] | None, scorer: ClassLogits) -> None:
    """Refuses a scorer whose head has its classes in another order than the saved one."""
    names = getattr(scorer, "class_names", None)
    if saved and names and list(names) != saved:
        raise PosteriorError(
            f"{folder} is of a head with other classes: got {list(names)}, expected {saved} in "
            "this order; give the rows' options in it"
        )


def load_members(
    base: nn.Module,
    folders: Sequence[Folder],
    scorer: ClassLogits,
    *,
    trainable: bool = False,
    other_base: bool = False,
) -> list[Posterior]:
    """Loads several posteriors on one base, each as an adapter of its own, of which one is active.

    Args:
        base: the base model, without adapters.
        folders: of the posteriors; the first becomes the adapter "default", the active one.
        scorer: as in `load_posterior`, and so are the others.

    Raises:
        PosteriorError: as `load_posterior`, or if they change the base's own weights differently.
    """
    places = [folder_of(folder) for folder in folders]
    all_details = [_details(place) for place in places]
    for place, details in zip(places, all_details, strict=True):
        _prepare(base, place, details, other_base)
    if len(places) > 1:
        _refuse_unlike_bases(places, all_details)
    model = base
    loaded: list[Posterior] = []
    for i, (place, details) in enumerate(zip(places, all_details, strict=True)):
        name = f"member{i}" if i else ADAPTER
        loaded.append(_load(model, place, details, scorer, name, trainable))
        model = loaded[0].model
    return loaded


def load_adapter(
    base: nn.Module,
    folder: Folder,
    scorer: ClassLogits = unbound,
    *,
    trainable: bool = False,
    other_base: bool = False,
) -> Point:
    """Loads any LoRA adapter folder as a point, whoever trained it.

    The arguments are those of `load_posterior`.

    Raises:
        PosteriorError: if the folder holds no LoRA adapter, or it does not fit the model.
    """
    place = folder_of(folder)
    kind = _config(place).get("peft_type")
    if kind != "LORA":
        got = f"no {CONFIG}" if kind is None else f"a {kind} adapter"
        raise PosteriorError(f"{place} is not a LoRA adapter: got {got}, expected PEFT's LoRA")
    details = read_details(place) if (place / DETAILS).is_file() else {}
    _prepare(base, place, details, other_base)
    model = _load_adapter(base, place, details, ADAPTER, trainable)
    return Point(model.eval(), scorer)


def _details(folder: Path) -> dict[str, Any]:
    """What `posterior.json` says, or would say of an earlier version's checkpoint, without one."""
    if (folder / DETAILS).is_file() or not _roots(folder):
        return read_details(folder)
    return {"posterior": "gaussian", "facts": {}, "format": FORMAT}


def _roots(folder: Path) -> dict[str, Tensor]:
    """G by slot name and part, from the adapter's own file, where earlier versions put it."""
    if not any((folder / name).is_file() for name in WEIGHTS):
        return {}
    try:
        weights = load_peft_weights(str(folder), device="cpu")
    except SafetensorError:
        return {}
    roots = {name: value for name, value in weights.items() if name.endswith(".root_std")}
    return {name.removeprefix(PREFIX): value for name, value in roots.items()}


def _prepare(base: nn.Module, folder: Path, details: Mapping[str, Any], other_base: bool) -> None:
    """Refuses a base that is not the one fitted on, after resizing its vocabulary as then."""
    if any(isinstance(module, PeftModel | LoraLayer) for module in base.modules()):
        raise PosteriorError(
            f"{folder} cannot be loaded: got a base with an adapter on it, which would be replaced,"
            " expected the base alone; load the base anew, or call unload() on its PEFT model"
        )
    embedding: Any = input_embedding(base)
    rows = details.get("embedding_rows")
    if rows is not None and embedding is not None and len(embedding.weight) != rows:
        base.resize_token_embeddings(rows, mean_resizing=False)  # type: ignore[operator]
    samples = details.get("base_samples")
    differing = differs(samples, base) if samples else []
    if differing and not other_base:
        raise PosteriorError(
            f"{folder} is of another base model: got other values of {differing[:3]}"
            f"{' …' if len(differing) > 3 else ''}, expected those of the base it was fitted on"
            f"{_named(folder, details)}; load that one, or pass other_base=True to go on with this"
        )
    fitted_in = (samples or {}).get("precision")
    present = precision_of(base)
    if fitted_in not in (None, present):
        logger.warning(
            "%s was fitted over a base in %s and is used over one in %s: it answers a little "
            "differently than it was evaluated",
            folder,
            fitted_in,
            present,
        )


def _named(folder: Path, details: Mapping[str, Any]) -> str:
    name = details.get("base_model") or base_name(folder)
    return f", {name}" if name else ""


def _refuse_unlike_bases(folders: Sequence[Path], all_details: Sequence[Mapping[str, Any]]) -> None:
    """Refuses members that change the base's own weights differently."""
    first: dict[str, Tensor] | None = None
    if len({bool(_config(folder).get("trainable_token_indices")) for folder in folders}) > 1:
        raise PosteriorError(
            f"PEFT cannot load these members on one model: got {len(folders)} of which some have "
            "trainable_token_indices, expected all or none; fit all of them with the same option"
        )
    for folder, details in zip(folders, all_details, strict=True):
        names = details.get("kept_beside", [])
        weights = load_peft_weights(str(folder), device="cpu") if names else {}
        changed = {name: weights[name] for name in names}
        first = changed if first is None else first
        same_names = changed.keys() == first.keys()
        if not (same_names and all(torch.equal(changed[n], first[n]) for n in changed)):
            raise PosteriorError(
                f"members on unlike bases: got {folder}, which changes {sorted(changed)[:3]} of "
                "the base itself, expected members that change nothing but their adapters; use "
                "modules_to_save for what is trained beside LoRA"
            )


def _load(
    base: nn.Module,
    folder: Path,
    details: Mapping[str, Any],
    scorer: ClassLogits,
    adapter: str,
    trainable: bool,
) -> Posterior:
    kind = details["posterior"]
    if kind not in KINDS:
        raise PosteriorError(
            f"{folder} is of the family {kind!r}, expected one of {sorted(KINDS)}; upgrade "
            "bayestune"
        )
    model = _load_adapter(base, folder, details, adapter, trainable).eval()
    if "mean_digest" in details and mean_digest(Slots(model, adapter)) != details["mean_digest"]:
        raise PosteriorError(
            f"the adapter in {folder} is not the one its {DETAILS} was written for, or it is of "
            "another model; restore the folder or fit again"
        )
    tensors = _tensors(folder)
    try:
        posterior = KINDS[kind].restore(Saved(model, scorer, tensors, details["facts"], adapter))
    except ValueError as error:
        raise PosteriorError(f"{folder / TENSORS} does not fit: it is {error}") from error
    model.eval()
    return posterior


def _tensors(folder: Path) -> dict[str, Tensor]:
    if not (folder / DETAILS).is_file():
        return _roots(folder)
    try:
        return load_file(folder / TENSORS)
    except (SafetensorError, OSError) as error:
        message = f"{folder / TENSORS} is missing, damaged or cut off ({error}); fit again"
        raise PosteriorError(message) from error


def _load_adapter(
    base: nn.Module, folder: Path, details: Mapping[str, Any], adapter: str, trainable: bool
) -> PeftModel:
    make: Any = PeftModel.from_pretrained
    try:
        if isinstance(base, PeftModel):
            type(base).load_adapter(base, str(folder), adapter, is_trainable=trainable)
            return base
        with old_names_unsaid():
            model = make(base, folder, adapter_name=adapter, is_trainable=trainable)
    except (RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise PosteriorError(
            f"the adapter in {folder} does not fit this model or is damaged; its base is "
            f"{details.get('base_model', 'not recorded')} ({str(error).splitlines()[0]})"
        ) from error
    if beside := details.get("kept_beside"):
        if unknown := sorted(set(beside) - set(model.state_dict())):
            raise PosteriorError(
                f"{folder} is of another model: got weights of {unknown[:3]}, which this one has "
                "not, expected the base it was fitted on"
            )
        model.kept_beside = tuple(beside)
    return model
