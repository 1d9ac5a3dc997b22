"""What a model's files hold, so that results on other weights under the same name are noticed.

Keys of cells know a folder by its configuration and the sizes of its files, which a model that is
trained further and saved in place leaves as they are.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from bayestune.bench.store import LOCKS, claimed
from bayestune.errors import Refusal
from bayestune.session import name_in_records
from bayestune.whole_files import write_text_whole

MODELS = "models.json"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.gguf")
_OF_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "chat_template*", "special_tokens_map.json")
_BLOCKS = 1024  # of each file that are read: all of one up to 4 MiB
_BLOCK = 4096  # bytes


def weights_digest(model: str | None) -> str | None:
    """A short hash of a local model's weights and tokenizer; None of models that lie elsewhere.

    Of large files it reads blocks from the first to the last: training in place changes nearly all.
    """
    path = Path(model or "").expanduser()
    if not model or not path.exists():
        return None
    whole = hashlib.sha256()
    for file in [path] if path.is_file() else _files(path):
        whole.update(f"{file.name} {file.stat().st_size}\n".encode())
        for block in _blocks(file):
            whole.update(block)
    return whole.hexdigest()[:16]


def _files(folder: Path) -> list[Path]:
    found = set()
    for pattern in (*_WEIGHTS, *_OF_TOKENIZER):
        found.update(path for path in folder.glob(pattern) if path.is_file())
    return sorted(found)


def _blocks(file: Path) -> Iterator[bytes]:
    count = -(-file.stat().st_size // _BLOCK)
    number = min(count, _BLOCKS)
    with file.open("rb") as opened:
        for i in range(number):
            place = i * (count - 1) // max(1, number - 1)
            opened.seek(place * _BLOCK)
            yield opened.read(_BLOCK)


def check_weights(folder: Path, models: Iterable[str | None]) -> None:
    """Notes in a results folder what its models hold, or compares it with what is noted.

    Raises:
        Refusal: if a model of that name held other weights.
    """
    found = {name_in_records(model): weights_digest(model) for model in models if model}
    with claimed(folder / LOCKS, "models", wait=True):
        file = folder / MODELS
        before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        for name, now in found.items():
            if before.get(name) not in (None, now):
                raise Refusal(
                    f"{folder} has results of {name}: got {now or 'no such files'}, expected its "
                    f"weights and tokenizer of then, {before[name]}; put them back, rename the "
                    "model's folder, or choose another --output"
                )
        known = {name: now for name, now in found.items() if now}
        write_text_whole(file, json.dumps(before | known, indent=1) + "\n")
