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
    """Loads a model, without a name the default one, onto the accelerator if there is one.

    An `outline` has no weights: settings can be checked against it. What is open stays as it is.
    A model `to_train` in parts is left to what shards it: as a whole it may not fit.
    """
    if isinstance(name, LoadedModel):
        return name
    kind = dtype if is_bits(dtype) else getattr(torch, dtype)
    options: dict[str, Any] = {"dtype": kind, "num_labels": num_labels}
    if outline:
        options["device"] = "meta"
    loaded = load_default(**options) if name is None else load_model(name, **options)
    how = sharding()
    sharded = to_train and how is not None and how.of_model
    whole = not (outline or sharded or is_bits(dtype))
    if whole and torch.accelerator.is_available():
        loaded.model.to(torch.accelerator.current_accelerator())  # type: ignore[arg-type]
    return loaded


def dtype_of(model: nn.Module) -> str:
    """With which type a model is opened again as it is.

    Weights that are quantised on the disk already are so without being asked for.
    """
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.pre_quantized:
        return precision_of(model)
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def num_classes(task: Task, scoring: Scoring) -> int | None:
    """C of the classification head that a task asks for; None for a language model."""
    return len((*task.train, *task.evaluation)[0].options) if scoring == "head" else None
