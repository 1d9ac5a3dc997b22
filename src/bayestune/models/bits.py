"""Bases in 4 or 8 bits: how transformers is told to load them, and what cannot be quantised."""

import logging
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, cast, get_args

import torch
from packaging.version import Version
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from bayestune.adapters import head_parts, is_classifier, num_quantised, quant_method_of
from bayestune.errors import Refusal

logger = logging.getLogger(__name__)

Bits = Literal["4bit", "8bit"]
EXTRA = "pip install 'bayestune[quantised]'"
OLDEST = Version("0.46.1")  # of bitsandbytes: the first one that runs without a GPU


def is_bits(dtype: torch.dtype | str) -> bool:
    """Whether a type of weights is one of those that are made on loading."""
    return dtype in get_args(Bits)


def quantisation(
    name: str, bits: str, outline: PreTrainedModel, device: str | torch.device | None
) -> dict[str, Any]:
    """What `from_pretrained` is told, so that the linear layers but the head have so few bits.

    4 bits are QLoRA's: NormalFloat with doubly quantised scales, products in bfloat16. What is not
    quantised (embeddings, norms, heads) is float32, as PEFT's `prepare_model_for_kbit_training`
    has it.

    Args:
        name: of the model, for messages.
        bits: "4bit" or "8bit".
        outline: the model without weights.
        device: where it shall be; None, and "meta" of outlines, for the accelerator or the CPU.

    Raises:
        Refusal: if bitsandbytes is missing or cannot run here, or the weights are quantised
            already.

    Reference:
        Dettmers et al.: QLoRA, NeurIPS 2023, https://arxiv.org/abs/2305.14314.
    """
    _refuse_without_package(bits)
    if (method := quant_method_of(outline)) is not None:
        raise Refusal(
            f"{name!r} is quantised already: got dtype {bits!r} for weights of {method}, expected "
            "plain ones; leave the dtype out to load it as it is, or give the model it was made of"
        )
    four = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    }
    settings: Any = four if bits == "4bit" else {"load_in_8bit": True}
    asked = BitsAndBytesConfig(**settings, llm_int8_skip_modules=_parts_of_a_head(outline))
    place = torch.device(device or "meta")
    if place.type == "meta":
        place = _own_device()
    places = {"": str(place)}
    try:
        AutoHfQuantizer.from_config(asked, pre_quantized=False).validate_environment(
            device_map=places
        )
    except (ImportError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise Refusal(
            f"bitsandbytes cannot quantise here: got dtype {bits!r} and {reason!r}, expected a "
            "device that it supports; use --dtype bfloat16"
        ) from error
    # bitsandbytes says in every layer of every pass that it casts
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return {"quantization_config": asked, "device_map": places, "dtype": torch.float32}


def settle_quantised(name: str, bits: str, model: nn.Module) -> None:
    """Refuses a model none of whose layers could be quantised; says it of one that is so in part.

    Experts that are one tensor of three axes are no linear layers, so they stay as they are.
    """
    for module in model.modules():
        # On some CPUs bitsandbytes repacks 4-bit weights in the first pass without gradients: with
        # coarser scales, not for all widths, and later passes have no gradients either.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        # 8-bit layers take their scales from the weight in the first pass, so that another layer
        # on the same weight would not find them.
        if getattr(getattr(module, "weight", None), "CB", None) is not None:
            module.init_8bit_state()  # type: ignore[operator]
    done, rest = num_quantised(model)
    if not done:
        raise Refusal(
            f"{name!r} has no layer that can be quantised: got dtype {bits!r}, expected linear "
            "layers besides the head; use --dtype bfloat16"
        )
    if rest > done:
        said = "%s: %s reaches %.0f %% of the weights; the rest are no linear layers, in float32"
        logger.warning(said, name, bits, 100 * done / (done + rest))


def weights_beside(model: nn.Module) -> Iterator[Any]:
    """What bitsandbytes' layers keep of their weights apart from parameters and buffers."""
    for module in model.modules():
        own = vars(module)
        if own.get("quant_state") is not None:
            yield own["quant_state"]
        if type(own.get("state")).__name__ == "MatmulLtState":
            yield from (each for each in vars(own["state"]).values() if isinstance(each, Tensor))


def _refuse_without_package(bits: str) -> None:
    try:
        found = version("bitsandbytes")
    except PackageNotFoundError:
        found = None
    if found is None or Version(found) < OLDEST:
        got = "no bitsandbytes" if found is None else f"bitsandbytes {found}"
        raise Refusal(
            f"dtype {bits!r} needs a package: got {got}, expected {OLDEST} or newer; {EXTRA}"
        )


def _parts_of_a_head(outline: PreTrainedModel) -> list[str] | None:
    """The parts of a classifier that are trained whole; None of a language model."""
    return [*head_parts(outline), "pooler"] if is_classifier(outline) else None


def _own_device() -> torch.device:
    if torch.accelerator.is_available():
        return cast(torch.device, torch.accelerator.current_accelerator())
    return torch.device("cpu")
