"""The process: its allocator keeps freed blocks, its peak memory is measured anew, its revision."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bayestune import runtime

FAULTS = """
import resource, sys, torch
from bayestune.runtime import keep_freed_memory
took = [keep_freed_memory(word == "keep") for word in sys.argv[1:]]
def work():
    return torch.ones(64, 2**17).mul(2)  # two blocks of 32 MiB
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
for _ in range(8):
    work()
print(all(took), faults())
"""
WITHOUT_RESOURCE = """
import sys
from pathlib import Path
sys.modules["resource"] = None
from bayestune import runtime
runtime._PROCESS = Path("nowhere")
print(runtime.peak_memory_mb())
"""


def run(*words):
    words = [sys.executable, "-c", *words]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_blocks_are_used_again_until_the_defaults_come_back():
    turns = [run(FAULTS, "keep") for _ in range(3)]  # a system that is short of memory takes some
    if turns[0][0] != "True":
        pytest.skip("another C library")
    pages = 4 * 2 * 2**25 // 4096
    assert min(int(kept) for _, kept in turns) < pages / 20
    stock = int(run(FAULTS, "keep", "stock")[1])
    assert stock > pages / 4  # huge pages, where there are some, make fewer faults


def test_another_system_or_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(runtime.ctypes, "CDLL", lambda _: object())
    for platform in ("darwin", "linux"):
        monkeypatch.setattr(runtime.sys, "platform", platform)
        assert runtime.keep_freed_memory() is False


def test_the_peak_is_measured_anew_after_a_reset(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    runtime.keep_freed_memory(False)
    block = torch.ones(2**26)  # 256 MiB
    peak = runtime.peak_memory_mb()
    assert peak > 256
    del block
    runtime.reset_peak_memory()
    after = runtime.peak_memory_mb()
    if after == peak:
        pytest.skip("this system cannot reset the peak")
    assert after < peak - 200


@pytest.fixture
def elsewhere(monkeypatch):
    """A system without /proc."""
    monkeypatch.setattr(runtime, "_PROCESS", Path("nowhere"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(("platform", "unit"), [("darwin", 1), ("linux", 2**10)])
def test_the_peak_is_bytes_on_macos_and_kib_elsewhere(elsewhere, monkeypatch, platform, unit):
    usage = SimpleNamespace(ru_maxrss=5 * 2**20 // unit)
    resource = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda _: usage)
    monkeypatch.setattr(runtime, "resource", resource)
    monkeypatch.setattr(runtime.sys, "platform", platform)
    runtime.reset_peak_memory()
    assert runtime.peak_memory_mb() == 5


def test_a_system_without_the_resource_module_reports_nan():
    assert run(WITHOUT_RESOURCE) == ["nan"]


def test_on_an_accelerator_the_peak_is_the_accelerators(monkeypatch):
    resets = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7 * 2**20)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: resets.append(1))
    runtime.reset_peak_memory()
    assert runtime.peak_memory_mb() == 7
    assert resets == [1]


def test_the_revision_is_our_own_checkouts_and_not_one_we_are_installed_in(monkeypatch, tmp_path):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    file = tmp_path / "src/bayestune/runtime.py"
    file.parent.mkdir(parents=True)
    file.write_text("")
    for words in (["init"], ["add", "."], ["commit", "-m", "ours"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    monkeypatch.setattr(runtime, "__file__", str(file))
    clean = runtime.revision()
    assert clean
    file.write_text("changed")
    assert runtime.revision() == f"{clean}-dirty"
    inside = tmp_path / "lib/site-packages/bayestune/runtime.py"
    monkeypatch.setattr(runtime, "__file__", str(inside))
    inside.parent.mkdir(parents=True)
    assert runtime.revision() is None


@pytest.mark.parametrize(
    ("environment", "name", "of_model"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP 1", True),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "FSDP 2", True),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ZeRO-2", False),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            "ZeRO-3",
            True,
        ),
    ],
)
def test_what_shards_a_training_is_read_from_the_launcher(environment, name, of_model, monkeypatch):
    assert runtime.sharding() is None
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert runtime.sharding() == (name, of_model)


def test_the_stage_in_deepspeeds_own_file_is_the_one(monkeypatch, tmp_path):
    file = tmp_path / "zero3.json"
    file.write_text('{"zero_optimization": {"stage": 3}}', encoding="utf-8")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    assert runtime.sharding() == ("ZeRO-3", True)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_work_that_is_shared_comes_back_in_order(count, monkeypatch):
    items = list(range(count))
    shares = [[item**2 for item in items[rank::3]] for rank in range(3)]

    def gather(own):
        assert own == shares[1]
        return shares

    monkeypatch.setattr(runtime, "num_processes", lambda: 3)
    monkeypatch.setattr(runtime, "process_index", lambda: 1)
    monkeypatch.setattr(runtime, "of_all_processes", gather)
    assert runtime.shared_work(items, lambda item: item**2) == [item**2 for item in items]
