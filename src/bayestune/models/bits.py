"""Bases in 4 or 8 bits: the arguments by which transformers quantises them, and what it cannot."""

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
    """Whether a type of weights is "4bit" or "8bit", to which weights are quantised on loading."""
    return dtype in get_args(Bits)


def quantisation(
    name: str, bits: str, outline: PreTrainedModel, device: str | torch.device | None
) -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantise all linear layers but those of the head.

    4 bits are QLoRA's: NormalFloat with doubly quantised scales, products in bfloat16. What is not
    quantised (embeddings, norms, heads) is float32, as PEFT's `prepare_model_for_kbit_training`
    has it.

    Args:
        name: of the model, for messages.
        bits: "4bit" or "8bit".
        outline: the model without weights.
        device: where the model is to be; None or "meta" for the accelerator, or else the CPU.

    Returns:
        `quantization_config`, `device_map` and `dtype`.

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
    settings: dict[str, Any] = {"load_in_8bit": True}
    if bits == "4bit":
        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16,
        }
    config = BitsAndBytesConfig(**settings, llm_int8_skip_modules=_parts_of_a_head(outline))
    target = torch.device(device or "meta")
    if target.type == "meta":
        target = _own_device()
    device_map = {"": str(target)}
    try:
        AutoHfQuantizer.from_config(config, pre_quantized=False).validate_environment(
            device_map=device_map
        )
    except (ImportError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise Refusal(
            f"bitsandbytes cannot quantise here: got dtype {bits!r} and {reason!r}, expected a "
            "device that it supports; use --dtype bfloat16"
        ) from error
    # bitsandbytes logs in every layer of every pass that it casts
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return {"quantization_config": config, "device_map": device_map, "dtype": torch.float32}


def settle_quantised(name: str, bits: str, model: nn.Module) -> None:
    """Settles what bitsandbytes would change in the first pass, and checks what was quantised.

    Warns of a model of which most weights are not. Experts that are one tensor of three axes are no
    linear layers, so they stay as they are.

    Args:
        name: of the model, for messages.
        bits: "4bit" or "8bit".
        model: the loaded model.

    Raises:
        Refusal: if no layer could be quantised.
    """
    for module in model.modules():
        # On some CPUs bitsandbytes would repack 4-bit weights in the first pass without gradients:
        # with coarser scales, not for all widths, and so that no later pass could have gradients.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        # 8-bit layers move their scales off the weight in the first pass, and another layer on the
        # same weight would then find none.
        if getattr(getattr(module, "weight", None), "CB", None) is not None:
            module.init_8bit_state()  # type: ignore[operator]
    quantised, rest = num_quantised(model)
    if not quantised:
        raise Refusal(
            f"{name!r} has no layer that can be quantised: got dtype {bits!r}, expected linear "
            "layers besides the head; use --dtype bfloat16"
        )
    if rest > quantised:
        message = "%s: %s reaches %.0f %% of the weights; the rest are no linear layers, in float32"
        logger.warning(message, name, bits, 100 * quantised / (quantised + rest))


def weights_beside(model: nn.Module) -> Iterator[Any]:
    """What bitsandbytes' layers keep of their weights apart from parameters and buffers."""
    for module in model.modules():
        attributes = vars(module)
        if attributes.get("quant_state") is not None:
            yield attributes["quant_state"]
        state = attributes.get("state")
        if type(state).__name__ == "MatmulLtState":
            yield from (value for value in vars(state).values() if isinstance(value, Tensor))


def _refuse_without_package(bits: str) -> None:
    try:
        installed = version("bitsandbytes")
    except PackageNotFoundError:
        installed = None
    if installed is None or Version(installed) < OLDEST:
        got = "no bitsandbytes" if installed is None else f"bitsandbytes {installed}"
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
