"""Has a PEFT model's own `save_pretrained` and `load_adapter` keep the standard deviations."""

import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from bayestune.adapters.adapter_facts import facts_of, facts_without_wrapper
from bayestune.adapters.adapter_folder import (
    DETAILS,
    TENSORS,
    add_beside,
    place_of,
    plain_state,
    write_posterior,
)
from bayestune.adapters.slots import PREFIX, Slots
from bayestune.adapters.spread import put_whole, shape_of, state_of
from bayestune.adapters.unsavable import refuse_changed_base
from bayestune.errors import Refusal

logger = logging.getLogger(__name__)


class OwnSaving:
    """Stands for two methods of a PEFT model that has Gaussian adapters.

    So every way to save it (a Trainer's checkpoints and `save_model`, `push_to_hub`) writes a stock
    adapter with the posterior's files beside it, and a Trainer that resumes, or loads its best
    checkpoint, reads them.
    """

    def __init__(self, model: PeftModel) -> None:
        self.model = model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        **options: Any,
    ) -> None:
        """`PeftModel.save_pretrained`, with the posterior's files beside each Gaussian adapter.

        Raises:
            Refusal: if the adapter is to be converted to another initial model.
        """
        if options.get("path_initial_model_for_weight_conversion") is not None:
            raise Refusal(
                "a Gaussian adapter cannot be converted: got "
                "path_initial_model_for_weight_conversion, expected None; the standard deviations "
                "belong to the adapter as it is"
            )
        model: Any = self.model
        names = list(selected_adapters or model.peft_config)
        state = options.pop("state_dict", None)
        if state is None:
            state = state_of(model)
        type(model).save_pretrained(
            model,
            save_directory,
            safe_serialization,
            names,
            save_embedding_layers,
            state_dict=plain_state(model, state),
            **options,
        )
        if options.get("is_main_process", True):
            for adapter in names:
                self._write_beside(Path(save_directory), adapter, state, save_embedding_layers)

    def _write_beside(
        self, folder: Path, adapter: str, state: Mapping[str, Tensor], embeddings: bool | str
    ) -> None:
        """Writes the posterior's files beside an adapter, if it is Gaussian."""
        slots = Slots(self.model, adapter)
        if not stochastic(slots):
            return
        plain = plain_state(self.model, state)
        place = place_of(folder, adapter)
        add_beside(slots, plain, place, embeddings)
        record = facts_of(slots, plain)
        record |= {"posterior": "gaussian", "facts": noise_of(slots)}
        write_posterior(place, record, _roots(slots, state))

    def load_adapter(
        self, model_id: str | os.PathLike[str], adapter_name: str, *args: Any, **options: Any
    ) -> Any:
        """`PeftModel.load_adapter`, with the standard deviations that lie beside the adapter."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*missing adapter keys.*root_std")
            model: Any = self.model
            loaded = type(model).load_adapter(model, model_id, adapter_name, *args, **options)
        folder = Path(model_id) / options.get("subfolder", "")
        layers = stochastic(Slots(self.model, adapter_name))
        if not layers:
            if (folder / TENSORS).is_file():
                logger.warning(
                    "%s holds a posterior, of which the mean alone is loaded as the adapter %r; "
                    "load_posterior brings the standard deviations back",
                    folder,
                    adapter_name,
                )
            return loaded
        missing = [name for name in loaded.missing_keys if name.endswith("root_std")]
        if missing and (folder / TENSORS).is_file() and (folder / DETAILS).is_file():
            put_roots(layers, load_file(folder / TENSORS))
            loaded.missing_keys[:] = [n for n in loaded.missing_keys if n not in missing]
        elif missing:
            logger.warning(
                "%s is a plain adapter, loaded as the mean of %r, whose standard deviations stay "
                "as they were",
                folder,
                adapter_name,
            )
        return loaded


class SavingWithoutWrapper:
    """Stands for `save_pretrained` of a model whose own `add_adapter` made the adapter.

    So it writes the active adapter as a stock one, with the posterior's files beside it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> None:
        """`PreTrainedModel.save_pretrained`, with the posterior's files beside the adapter."""
        model: Any = self.model
        slots = Slots(model)
        state = state_of(model) if state_dict is None else state_dict
        plain = plain_state(model, state)
        type(model).save_pretrained(model, save_directory, is_main_process, plain, **options)
        if is_main_process and stochastic(slots):
            record = facts_without_wrapper(slots, plain)
            record |= {"posterior": "gaussian", "facts": noise_of(slots)}
            write_posterior(Path(save_directory), record, _roots(slots, state, ""))


def keep_standard_deviations(model: nn.Module, adapter: str) -> None:
    """Replaces the model's own saving and loading by methods that keep the standard deviations.

    Raises:
        Refusal: if the adapter's initialisation changed the base, so that it cannot be saved.
    """
    model = getattr(model, "_orig_mod", model)
    refuse_changed_base(model, adapter)
    if isinstance(model, PeftModel) and "save_pretrained" not in vars(model):
        saving: Any = OwnSaving(model)
        model.save_pretrained = saving.save_pretrained  # type: ignore[method-assign]
        model.load_adapter = saving.load_adapter  # type: ignore[method-assign]
    if getattr(model, "_hf_peft_config_loaded", False) and "save_pretrained" not in vars(model):
        unwrapped: Any = SavingWithoutWrapper(model)  # type: ignore[arg-type]
        model.save_pretrained = unwrapped.save_pretrained  # type: ignore[method-assign]


def put_roots(layers: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Gives Gaussian layers, by slot name, the G (r, k) in the tensors of a posterior's folder.

    Raises:
        Refusal: if they are of other slots or shapes.
    """
    roots = {name.removesuffix(".root_std"): value for name, value in tensors.items()}
    unfit = sorted(set(layers) ^ set(roots))
    for name in set(layers) & set(roots):
        if shape_of(layers[name].root_std) != roots[name].shape:
            unfit.append(name)
    if unfit:
        raise Refusal(
            f"standard deviations of another adapter: {len(unfit)} slots do not fit, such as "
            f"{unfit[0]}; expected {len(layers)} slots in the adapter's shapes; load the folder of "
            "the same adapter"
        )
    for name, layer in layers.items():
        put_whole(layer.root_std, roots[name])


def noise_of(slots: Slots) -> dict[str, Any]:
    """How the training noise of an adapter's Gaussian slots is made, for `posterior.json`."""
    first = next(iter(stochastic(slots).values()))
    return {"noise": first.noise, "init_root_std": first.init_root_std}


def stochastic(slots: Slots) -> dict[str, Any]:
    """The Gaussian slots of an adapter by name."""
    return {name: slot for name, slot in slots.modules().items() if hasattr(slot, "root_std")}


def _roots(slots: Slots, state: Mapping[str, Tensor], prefix: str = PREFIX) -> dict[str, Tensor]:
    """G by the name it has in `posterior.safetensors`."""
    roots = {}
    for name in stochastic(slots):
        value = state[f"{prefix}{name}.{slots.adapter}.root_std"]
        roots[f"{name.replace('_orig_mod.', '')}.root_std"] = value
    return roots
