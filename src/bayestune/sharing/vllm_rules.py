"""Checks by vLLM's own rules whether its LoRA loader takes a folder, before a server refuses it.

The rules are those of vLLM 0.33.0: its `vllm/lora/peft_helper.py`, `lora_model.py` and `utils.py`,
and `vllm/config/lora.py`.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from bayestune.adapters import CONFIG, WEIGHTS

VERSION = "0.33.0"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be; an adapter's rank may be any up to it."""

_NEEDED = ("r", "lora_alpha", "target_modules")
_HEADS = ("classifier", "score")
_LEAVE_THE_BASE = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")  # of init_lora_weights
_WEIGHTS = (".lora_A.weight", ".lora_B.weight")
_EMBEDDINGS = (".lora_embedding_A", ".lora_embedding_B")
_LEFT_OUT = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")  # ignored by vLLM
_RETRAIN = "fit with a plain LoraConfig"
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "lora_bias": "a bias in lora_B",
    "alora_invocation_tokens": "an activated LoRA (aLoRA)",
    "layer_replication": "replicated layers",
    "use_bdlora": "a block-diagonal LoRA",
    "use_qalora": "a QALoRA",
}


@dataclass(frozen=True)
class Finding:
    """What vLLM makes of an adapter's folder.

    Args:
        got: what is in the folder.
        expected: by vLLM.
        remedy: what to do.
        refused: whether it does not load there; else it loads, and this is worth knowing.
    """

    got: str
    expected: str
    remedy: str
    refused: bool = True

    def __str__(self) -> str:
        return f"got {self.got}, expected {self.expected}; {self.remedy}"


def vllm_findings(folder: Path) -> list[Finding]:
    """What vLLM refuses in a LoRA folder, or reads differently from PEFT; empty for plain LoRA.

    Whether the base model's layers take LoRA is not checked: only the server knows.
    """
    path = folder / CONFIG
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return [*_of_settings(config), *_of_ranks(config), *_of_weights(folder, config)]


def smallest_max_rank(rank: int) -> int | None:
    """The least `--max-lora-rank` that takes a rank; None if none does.

    >>> smallest_max_rank(12), smallest_max_rank(600)
    (16, None)
    """
    return next((choice for choice in RANKS if choice >= rank), None)


def largest_rank(config: Mapping[str, Any]) -> int:
    """The largest rank of any layer by an adapter's configuration; 0 if that names none."""
    return max([config.get("r") or 0, *(config.get("rank_pattern") or {}).values()])


def _of_settings(config: Mapping[str, Any]) -> Iterator[Finding]:
    missing = [name for name in _NEEDED if config.get(name) is None]
    if missing:
        yield Finding(
            f"an {CONFIG} without {missing}", f"all of {list(_NEEDED)}", "save it with PEFT"
        )
    for name, what in _UNSUPPORTED.items():
        if config.get(name):
            yield Finding(f"{what} ({name}={config[name]!r})", "plain LoRA", _RETRAIN)
    bias = config.get("bias", "none")
    if bias != "none":
        yield Finding(f"trained biases (bias={bias!r})", "bias='none'", _RETRAIN)
    whole = [name for name in config.get("modules_to_save") or () if name not in _HEADS]
    if whole:
        yield Finding(
            f"modules trained whole (modules_to_save has {whole})",
            f"none but one of {list(_HEADS)}",
            "fit without modules_to_save",
        )
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _LEAVE_THE_BASE:
        yield Finding(
            f"init_lora_weights={init!r}, which changes the base when PEFT loads it",
            "a start that leaves the base as it is",
            "convert it with PEFT's path_initial_model_for_weight_conversion",
        )


def _of_ranks(config: Mapping[str, Any]) -> Iterator[Finding]:
    rank = largest_rank(config)
    if config.get("r") is not None and config["r"] <= 0:
        yield Finding(f"rank {config['r']}", "1 or more", _RETRAIN)
    if smallest_max_rank(rank) is None:
        most = RANKS[-1]
        yield Finding(f"rank {rank}", f"at most {most}", "fit with a smaller --lora.rank")
    patterns = [name for name in ("rank_pattern", "alpha_pattern") if config.get(name)]
    if patterns:
        yield Finding(
            " and ".join(patterns),
            f"vLLM {VERSION} or newer, because older ones leave such patterns out without a word",
            "upgrade the server",
            refused=False,
        )


def _of_weights(folder: Path, config: Mapping[str, Any]) -> Iterator[Finding]:
    path = folder / WEIGHTS[0]
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
    except (OSError, SafetensorError) as error:
        yield Finding(f"no readable {WEIGHTS[0]} ({error})", "one", "save it with PEFT")
        return
    heads = [name for name in config.get("modules_to_save") or () if name in _HEADS]
    others = list(_others(names, heads))
    if others:
        shown = f"{others[:2]}{' …' if len(others) > 2 else ''}"
        yield Finding(
            f"{len(others)} weights beside LoRA's, such as {shown}",
            "lora_A and lora_B alone",
            "fit without what is trained or kept beside LoRA, or serve with PEFT",
        )
    if any(name.endswith(_EMBEDDINGS) for name in names) or any(".lm_head." in n for n in names):
        yield Finding(
            "LoRA on embeddings or the output layer",
            "a model for which vLLM has that",
            "try it, or fit with other --lora.targets",
            refused=False,
        )


def _others(names: Iterable[str], heads: Iterable[str]) -> Iterator[str]:
    """Names of weights that vLLM cannot place."""
    of_heads = tuple(f".{head}.{part}" for head in heads for part in ("weight", "bias"))
    for name in names:
        if not name.endswith((*_WEIGHTS, *_EMBEDDINGS, *_LEFT_OUT, *of_heads)):
            yield name
