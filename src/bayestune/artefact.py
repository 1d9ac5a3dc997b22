"""Saves and loads a posterior as a stock PEFT adapter (the mean) with two files beside it, and exports draws."""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import bayestune
from bayestune.lora import ADAPTER, PREFIX, adapted_layers, bayesify, gaussian_layers

FORMAT = 1
ROOT_STD = "root_std"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
TENSORS, DETAILS = "posterior.safetensors", "posterior.json"


class PosteriorError(ValueError):
    """A folder is not a posterior that can be loaded on this model."""


def mean_digest(model: nn.Module, adapter: str = ADAPTER) -> str:
    """A hash of the adapter's A and B, so that a standard deviation is never put beside another mean."""
    digest = hashlib.sha256()
    for path, layer in sorted(adapted_layers(model, adapter).items()):
        for slot in (layer.lora_A, layer.lora_B):
            if adapter in slot:
                digest.update(path.encode())
                digest.update(
                    slot[adapter].get_parameter("weight").detach().float().cpu().contiguous().numpy().tobytes()
                )
    return digest.hexdigest()


def save_posterior(model: nn.Module, folder: Path, details: Mapping[str, Any] | None = None) -> Path:
    """Writes the model's adapter as a posterior: a stock LoRA folder of the mean, `posterior.safetensors` and `.json`.

    Each file is written elsewhere and moved into place, `posterior.json` last, so a folder that has it is whole.

    Args:
        model: a PEFT model, converted by `bayesify` or not.
        folder: made if it is not there.
        details: what else to keep in `posterior.json`: method, task, base model.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    layers = gaussian_layers(model)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as scratch:
        _save_adapter(model, Path(scratch), {})
        tensors = {f"{path}.{ROOT_STD}": layer.root_std.detach().cpu().contiguous() for path, layer in layers.items()}
        save_file(tensors, Path(scratch) / TENSORS, {"format": "pt"})
        record = {
            "format": FORMAT,
            "bayestune": bayestune.__version__,
            "posterior": "gaussian" if layers else "point",
            "layers": {path: list(layer.weight.shape) for path, layer in layers.items()},
            "noise": next(iter(layers.values())).noise if layers else None,
            "init_root_std": next(iter(layers.values())).init_root_std if layers else None,
            "mean_digest": mean_digest(model),
            **(details or {}),
        }
        (Path(scratch) / DETAILS).write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
        for name in (*ADAPTER_FILES, TENSORS, DETAILS):
            (Path(scratch) / name).replace(folder / name)
    return folder


def export_draw(model: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> Path:
    """Writes one draw as a plain LoRA adapter folder, which any LoRA server can load.

    Args:
        model: the PEFT model of the posterior.
        weights: A of the draw by layer path, as `Gaussian.draw` gives them, each (r, k).
        folder: made if it is not there.

    Returns:
        The folder.

    Raises:
        ValueError: if a path is not a layer of the model.
    """
    if unknown := sorted(set(weights) - set(adapted_layers(model))):
        raise ValueError(f"a draw of another model: got the layers {unknown[:3]}, expected paths of this adapter")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as scratch:
        _save_adapter(model, Path(scratch), weights)
        for name in ADAPTER_FILES:
            (Path(scratch) / name).replace(folder / name)
    return folder


def _save_adapter(model: nn.Module, folder: Path, weights: Mapping[str, Tensor]) -> None:
    state = {name: value for name, value in model.state_dict().items() if not name.endswith(f".{ROOT_STD}")}
    for path, weight in weights.items():
        name = f"{PREFIX}{path}.lora_A.{ADAPTER}.weight"
        state[name] = weight.to(state[name].dtype)
    model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)  # type: ignore[operator]


def read_details(folder: Path) -> dict[str, Any]:
    """What `posterior.json` says.

    Raises:
        PosteriorError: if the folder is no posterior, its file is cut off, or it is of a later format.
    """
    path = folder / DETAILS
    if not path.is_file():
        what = "a plain LoRA adapter" if (folder / ADAPTER_FILES[0]).is_file() else "no adapter"
        raise PosteriorError(f"{folder} is no posterior: got {what} without {DETAILS}, expected a folder of `fit`")
    try:
        details = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise PosteriorError(f"{path} is damaged or cut off ({error}); restore it or fit again") from None
    if details.get("format") != FORMAT:
        raise PosteriorError(
            f"{path} has format {details.get('format')}, expected {FORMAT}: it was written by bayestune "
            f"{details.get('bayestune')}; upgrade bayestune"
        )
    return details


def load_posterior(base: nn.Module, folder: Path, *, trainable: bool = False) -> tuple[PeftModel, dict[str, Any]]:
    """Loads a posterior on its base model; its draws are the saved one's, bit for bit.

    Args:
        base: the base model, without adapters.
        folder: what `save_posterior` wrote.
        trainable: whether training shall go on.

    Returns:
        The PEFT model, and what `posterior.json` says.

    Raises:
        PosteriorError: if the folder is no posterior, a file is cut off, or it is of another model, rank or mean.
    """
    details = read_details(folder)
    try:
        model = PeftModel.from_pretrained(base, folder, is_trainable=trainable)  # type: ignore[arg-type]
    except (RuntimeError, ValueError, SafetensorError) as error:
        raise PosteriorError(
            f"the adapter in {folder} does not fit this model or is damaged; its base is "
            f"{details.get('base_model', 'not recorded')} ({str(error).splitlines()[0]})"
        ) from error
    if mean_digest(model) != details["mean_digest"]:
        raise PosteriorError(
            f"the adapter in {folder} is not the one its {DETAILS} was written for, or of another model"
        )
    if details["posterior"] == "gaussian":
        bayesify(model, init_root_std=details["init_root_std"], noise=details["noise"])
        _load_root_stds(model, folder)
    return model.eval(), details


def _load_root_stds(model: nn.Module, folder: Path) -> None:
    try:
        tensors = load_file(folder / TENSORS)
    except (SafetensorError, OSError) as error:
        raise PosteriorError(f"{folder / TENSORS} is missing, damaged or cut off ({error}); fit again") from error
    layers = gaussian_layers(model)
    expected = {f"{path}.{ROOT_STD}": layer.root_std for path, layer in layers.items()}
    got = {name: tuple(value.shape) for name, value in tensors.items()}
    if got != {name: tuple(value.shape) for name, value in expected.items()}:
        raise PosteriorError(
            f"{folder / TENSORS} is of another model or rank: "
            f"got {len(got)} tensors such as {next(iter(got.items()), None)}, "
            f"expected {len(expected)} such as {next((n, tuple(v.shape)) for n, v in expected.items())}"
        )
    with torch.no_grad():
        for name, value in expected.items():
            value.copy_(tensors[name])
