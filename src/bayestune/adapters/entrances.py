"""Where the passes of a model begin and end, and what its inputs say of their rows."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from bayestune.adapters.one_pass import Sizes
from bayestune.adapters.row_groups import RowGroups, RowOf
from bayestune.adapters.slots import PREFIX, split_name
from bayestune.adapters.training_passes import TrainingPasses

_IDS = ("input_ids", "decoder_input_ids")
_EMBEDS = ("inputs_embeds", "decoder_inputs_embeds")
_TEXT = {"input_ids", "inputs_embeds"}
# modules whose linear layers see (T, N, …), by the end of their file's name and their class
_TIME_FIRST = {
    "modeling_longformer": ("LongformerSelfAttention",),
    "modeling_led": ("LEDEncoderSelfAttention",),
    "modeling_xlnet": ("XLNetFeedForward",),
    "modeling_fsmt": ("Attention", "EncoderLayer", "DecoderLayer"),
}


class Entrance:
    """The hooks of a module at whose calls a pass begins and ends.

    Args:
        passes: of the model.
        depth: of the module in the model; a module inside another one has the larger depth.
    """

    def __init__(self, passes: TrainingPasses, depth: int) -> None:
        self.passes = passes
        self.depth = depth

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook."""
        self.passes.begin(self.depth, sizes_of(args, kwargs))

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A forward hook; it is called after an error, too."""
        self.passes.end(self.depth, output)


class GenerationAtMean:
    """A model's `generate` under the mean adapter, because the passes of a text share no draw."""

    def __init__(self, passes: TrainingPasses, model: Any) -> None:
        self.passes = passes
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generates."""
        before = self.passes.at_mean
        self.passes.at_mean = True
        try:
            return type(self.model).generate(self.model, *args, **kwargs)
        finally:
            self.passes.at_mean = before


def found_passes(model: nn.Module) -> TrainingPasses | None:
    """The model's passes; None where it has no random layer."""
    for module in model.modules():
        if isinstance(passes := getattr(module, "passes", None), TrainingPasses):
            return passes
    return None


def passes_of(model: nn.Module) -> TrainingPasses:
    """The model's passes, one object for all its adapters; hooked to the model if needed.

    A pass is the outermost call of the model, of a transformers model in it (generation and some
    losses call the inner one), or of a module between them.
    """
    passes = found_passes(model) or TrainingPasses()
    modules = dict(model.named_modules())
    models = [path for path, module in modules.items() if isinstance(module, PreTrainedModel)]
    for path, module in modules.items():
        holds_or_is_model = any(f"{inner}.".startswith(f"{path}.") for inner in models)
        if not path or holds_or_is_model:
            _hook(module, Entrance(passes, len(path)))
    return passes


def _hook(module: nn.Module, entrance: Entrance) -> None:
    """Hooks an entrance to a module, in place of the one that an earlier adapter left there."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", None), Entrance):
                del hooks[key]
    module.register_forward_pre_hook(entrance.before, with_kwargs=True)
    module.register_forward_hook(entrance.after, always_call=True)
    if isinstance(module, GenerationMixin):
        module.generate = GenerationAtMean(entrance.passes, module)  # type: ignore[assignment]


def group_rows(
    model: nn.Module,
    size: int | None = None,
    *,
    row_of: RowOf | None = None,
    lasting: bool = False,
) -> None:
    """Makes sequences of a batch one row, so that they share their draw in the next training pass.

    The options of a multiple-choice head, inputs (N, C, T), are one row without it. Evaluation mode
    has no noise to share, so a model in it takes no setting for the next pass; nor does a model
    without random layers.

    Args:
        model: the model that `bayesify` has converted, or one that contains it.
        size: so many consecutive sequences are one row, such as the completions of one prompt.
        row_of: instead of a size, the number of each sequence's row, from 0, such as
            `[0, 1, 0, 1]`; or a function that gives it for a number of sequences.
        lasting: whether it holds for all later passes, until the next lasting setting, instead of
            only the next pass with random layers. A setting for the next pass takes precedence.

    Raises:
        Refusal: if not exactly one of `size` and `row_of` is given, or `size` is not positive; in
            the pass, if the batch does not divide into rows or `row_of` does not fit it.

    Example:
        Preference training gives the model [chosen; rejected]: both sides of a pair are one row.

        >>> from peft import LoraConfig, get_peft_model
        >>> from bayestune import bayesify, group_rows
        >>> base = nn.Sequential(nn.Linear(4, 3))
        >>> model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
        >>> bayesify(model)
        1
        >>> group_rows(model, row_of=[0, 1, 0, 1])
        >>> def pairs(sequences):
        ...     return [index % (sequences // 2) for index in range(sequences)]
        >>> group_rows(model, row_of=pairs, lasting=True)
    """
    groups = RowGroups(size, row_of)
    passes = found_passes(model) if lasting or model.training else None
    if passes is not None:
        passes.ask(groups, lasting=lasting)


def sizes_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Sizes | None:
    """The sizes that a model's inputs give a pass; None where no input is a tensor."""
    inputs = dict(kwargs)
    for position, value in enumerate(args):
        inputs.update(value if isinstance(value, Mapping) else {f"argument {position}": value})
    tensors = {n: value for n, value in inputs.items() if isinstance(value, Tensor) and value.dim()}
    if not tensors:
        return None
    windows = _of_pictures(tensors)
    for name in (*_IDS, *_EMBEDS):
        if name in tensors:
            ids = tensors[name] if name in _IDS else tensors[name][..., 0]
            sequences = ids.shape[:-1].numel()
            return Sizes(len(ids), sequences, ids.shape[-1], _packed(tensors, ids), windows)
    first = next(iter(tensors.values()))
    axes_with_tokens = 3 if first.is_floating_point() else 2  # features (N, T, k) or ids (N, T)
    tokens = first.shape[1] if first.dim() == axes_with_tokens else 0
    return Sizes(len(first), len(first), tokens, windows=windows)


def _of_pictures(tensors: Mapping[str, Tensor]) -> bool:
    """Whether rows are pictures, videos or spectrograms, without text."""
    grids = [value for value in tensors.values() if value.dim() > 3 and value.is_floating_point()]
    return bool(grids) and _TEXT.isdisjoint(tensors)


def _packed(tensors: Mapping[str, Tensor], ids: Tensor) -> Tensor | None:
    """The positions (N, T) if a sequence may hold several documents, by transformers' own rule."""
    positions = tensors.get("position_ids")
    if positions is None or "attention_mask" in tensors or torch.compiler.is_compiling():
        return None
    return positions if positions.shape == ids.shape and ids.dim() == 2 else None


def put_row_axes(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Sets which axis of its input is the rows', in each random layer, by slot name."""
    modules = {name.removeprefix(PREFIX): module for name, module in model.named_modules()}
    for slot, layer in layers.items():
        path, _ = split_name(slot)
        parent, _, leaf = path.rpartition(".")
        layer.row_axis = _row_axis(modules.get(parent, model), parent, leaf)


def _row_axis(parent: nn.Module, path: str, leaf: str) -> int | None:
    """The axis, 0 or 1, for a module of a parent; None where all rows share one draw.

    Experts receive tokens of any rows. DeBERTa projects positions, which all rows share, with the
    same layers as queries and keys: a row would see two draws if its own were not the shared one.
    """
    shared = getattr(parent, "share_att_key", False) and leaf in ("query_proj", "key_proj")
    if shared or "experts" in path.split("."):
        return None
    kinds = _TIME_FIRST.get(type(parent).__module__.rpartition(".")[2], ())
    return 1 if type(parent).__name__ in kinds else 0
