"""Names of models: directories, the Hub with and without network, and the default."""

import hashlib
import http.server
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ggufs import TEXT, left, save_directory, small
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError
from transformers import BertConfig, BertModel, T5Config

from bayestune.models import load, load_default, load_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A tiny model's directory, read only."""
    return save_directory(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def hub(monkeypatch):
    """The Hub's answer about any model: a list of file names, or an error to raise."""

    def answer(files):
        def model_info(self, name, timeout):
            if isinstance(files, Exception):
                raise files
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in files])

        monkeypatch.setattr(HfApi, "model_info", model_info)

    return answer


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty local cache of the Hub: call it with a model's id and its directory."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(name, folder):
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        commit = "0" * 40
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)

    return put


# Directories


def test_a_directory_gives_the_saved_model_and_tokenizer(tiny, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny.parent))
    loaded = load_model(f"~/{tiny.name}")
    ids = loaded.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    torch.testing.assert_close(loaded.model(ids).logits, small()(ids).logits)
    assert (loaded.name, loaded.model.training) == (str(tiny), False)


def test_dtype_device_and_attention_are_what_was_asked(tiny):
    loaded = load_model(str(tiny), dtype=torch.bfloat16, device="meta", attn_implementation="eager")
    assert (loaded.model.dtype, loaded.model.device.type) == (torch.bfloat16, "meta")
    assert loaded.model.config._attn_implementation == "eager"


def test_a_head_that_the_weights_do_not_hold_is_seeded(bert, byte_level, tmp_path):
    bert(num_labels=3).save_pretrained(tmp_path)
    byte_level.save_pretrained(tmp_path)
    state = torch.get_rng_state()
    heads = [load_model(str(tmp_path), num_labels=5).model.classifier.weight for _ in range(2)]
    assert heads[0].shape[0] == 5
    assert torch.equal(*heads)
    assert torch.equal(torch.get_rng_state(), state)
    kept = load_model(str(tmp_path), num_labels=3).model.classifier.weight
    assert torch.equal(kept, bert(num_labels=3).classifier.weight)


@pytest.mark.parametrize(
    ("special", "pad"),
    [({"eos_token": "</s>"}, "</s>"), ({"eos_token": "</s>", "pad_token": "<s>"}, "<s>")],
)
def test_pad_is_the_end_token_only_where_there_is_none(tmp_path, special, pad):
    assert load_model(str(save_directory(tmp_path, **special))).tokenizer.pad_token == pad


def adapter(folder):
    save_directory(folder)
    (folder / "adapter_config.json").write_text("{}")
    return folder


def encoder(folder):
    size = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=10, num_hidden_layers=1, **size)).save_pretrained(folder)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda folder: None, FileNotFoundError, "no config.json; expected a directory with .*Hub"),
        (adapter, ValueError, "is an adapter .* load it as a posterior, or give the base model"),
        (encoder, ValueError, "is .*BertModel.*; expected a causal language model"),
        (T5Config().save_pretrained, ValueError, "is t5; expected a causal language model"),
        (lambda folder: small().model.save_pretrained(folder), ValueError, "is .*LlamaModel.*; ex"),  # noqa: PLW0108
        (
            lambda folder: save_directory(folder, bos_token="<s>"),
            ValueError,
            "no pad and no end token; expected one: set and save it",
        ),
    ],
)
def test_a_directory_that_is_not_a_causal_model_is_refused(tmp_path, make, error, message):
    make(tmp_path)
    with pytest.raises(error, match=message):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./none.gguf", "no file './none.gguf'; expected the path of a GGUF file"),
        ("./no/such/directory", "unknown model './no/such/directory': no such directory.*Hub id"),
    ],
)
def test_a_path_without_a_file_is_refused(name, message):
    with pytest.raises(FileNotFoundError, match=message):
        load_model(name)


# The Hub


NOT_FOUND = RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))
NONSENSE = json.JSONDecodeError("Expecting value", "<html>", 0)


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (["adapter_config.json"], ValueError, "'owner/tiny' is an adapter"),
        (["tiny.gguf"], FileNotFoundError, "no config.json; .* of a GGUF model give the file"),
        (NOT_FOUND, FileNotFoundError, "unknown model 'owner/tiny': .* `hf auth login`.*pypi:NAME"),
        (NONSENSE, ConnectionError, r"cannot be asked \(JSONDecodeError"),
    ],
)
def test_what_the_hub_does_not_have_as_a_model_is_refused(hub, hub_cache, answer, error, message):
    hub(answer)
    with pytest.raises(error, match=message):
        load_model("owner/tiny")


def test_a_cached_model_is_loaded_when_the_hub_cannot_be_reached(tiny, hub, hub_cache, tmp_path):
    hub(OSError("no route"))
    hub_cache("owner/tiny", tiny)
    hub_cache("owner/both", adapter(tmp_path / "both"))
    started = time.perf_counter()
    assert load_model("owner/tiny").model.config.hidden_size == 32
    assert time.perf_counter() - started < 5
    with pytest.raises(ValueError, match="'owner/both' is an adapter"):
        load_model("owner/both")


@pytest.mark.parametrize("offline", [True, False])
def test_an_unreachable_hub_is_told_quickly(offline, hub_cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    started = time.perf_counter()
    with pytest.raises(ConnectionError, match=r"cannot be asked \(\w+: .*unset HF_HUB_OFFLINE"):
        load_model("owner/tiny")
    assert time.perf_counter() - started < 3


# The default model


def test_the_default_is_the_hubs_where_it_can_be_had(tiny, hub_cache, monkeypatch, caplog):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub_cache(load.DEFAULT_MODEL, tiny)
    with caplog.at_level(logging.INFO, "bayestune"):
        assert load_default(dtype=torch.bfloat16).name == load.DEFAULT_MODEL
    assert f"default model: {load.DEFAULT_MODEL}, from the Hub or its cache" in caplog.text


# A whole Hub


class FakeHub(http.server.SimpleHTTPRequestHandler):
    """As much of the Hub's protocol as loading a model needs, over a folder of its paths."""

    def end_headers(self):
        known = "/owner/tiny/" in self.path
        self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(self.path.encode()).hexdigest()}"')
        super().end_headers()

    def log_message(self, format, *args):
        pass


CODE = """
import sys, time
from bayestune.models import load_model
assert "gguf" not in sys.modules
started = time.perf_counter()
try:
    print(load_model(sys.argv[1]).model.config.hidden_size, time.perf_counter() - started < 10)
except OSError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.slow
def test_models_come_from_a_hub_and_later_from_its_cache(tiny, tmp_path):
    for revision in ("main", "0" * 40):
        shutil.copytree(tiny, tmp_path / "owner/tiny/resolve" / revision)
    about = tmp_path / "api/models/owner/tiny"
    about.parent.mkdir(parents=True)
    files = [{"rfilename": name} for name in left(tiny)]
    about.write_text(json.dumps({"id": "owner/tiny", "sha": "0" * 40, "siblings": files}))
    handler = partial(FakeHub, directory=tmp_path)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = os.environ | {
        "PYTHONPATH": str(Path(load.__file__).parents[2]),
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }

    def run(name, offline="0"):
        command = [sys.executable, "-c", CODE, name]
        own = env | {"HF_HUB_OFFLINE": offline}
        return subprocess.run(command, env=own, capture_output=True, text=True, check=True).stdout

    assert run("owner/tiny") == "32 True\n"
    assert run("owner/absent").startswith("FileNotFoundError unknown model 'owner/absent'")
    server.shutdown()
    server.server_close()
    assert run("owner/tiny") == "32 True\n"
    assert run("owner/tiny", offline="1") == "32 True\n"
    assert run("owner/absent", offline="1").startswith("ConnectionError unknown model")
