"""A model, opened by name with the head and the precision that a session asks for."""

from typing import Any, Literal

import torch
from torch import nn

from bayestune.adapters import precision_of
from bayestune.data import Scoring, Task
from bayestune.models import LoadedModel, is_bits, load_default, load_model
from bayestune.runtime import sharding

Dtype = Literal["float32", "bfloat16", "4bit", "8bit"]
Named = str | LoadedModel | None  # a model by its name, or one that is open already


def open_model(
    name: Named,
    dtype: Dtype = "float32",
    num_labels: int | None = None,
    *,
    outline: bool = False,
    to_train: bool = False,
) -> LoadedModel:
    """Loads a model onto the accelerator, if there is one.

    Args:
        name: of the model; None for the default one. One that is open already is returned as it is.
        dtype: of its weights.
        num_labels: C of a classification head; None for a language model.
        outline: whether to load it without weights, to check settings against it.
        to_train: whether it is to be trained. If a launcher shards models, it is then left on the
            CPU, because it may not fit on one device as a whole.
    """
    if isinstance(name, LoadedModel):
        return name
    torch_dtype = dtype if is_bits(dtype) else getattr(torch, dtype)
    options: dict[str, Any] = {"dtype": torch_dtype, "num_labels": num_labels}
    if outline:
        options["device"] = "meta"
    loaded = load_default(**options) if name is None else load_model(name, **options)
    shards = sharding()
    sharded = to_train and shards is not None and shards.of_model
    whole = not (outline or sharded or is_bits(dtype))
    if whole and torch.accelerator.is_available():
        loaded.model.to(torch.accelerator.current_accelerator())  # type: ignore[arg-type]
    return loaded


def dtype_of(model: nn.Module) -> str:
    """The `dtype` with which `open_model` opens a model again as it is.

    It names a quantisation, such as "4bit", only if that was done on loading: weights that are
    quantised on disk already are loaded so in any case.
    """
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.pre_quantized:
        return precision_of(model)
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def num_classes(task: Task, scoring: Scoring) -> int | None:
    """C of the classification head that a task asks for; None for a language model."""
    return len((*task.train, *task.evaluation)[0].options) if scoring == "head" else None
