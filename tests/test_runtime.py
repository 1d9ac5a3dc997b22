"""The C library's allocator: freed blocks are used again, so their pages need not be mapped anew."""

import subprocess
import sys

import pytest

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


def faults(*words: str) -> tuple[bool, int]:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, *words], capture_output=True, text=True, check=True
    )
    took, count = done.stdout.split()
    return took == "True", int(count)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_blocks_are_used_again_until_the_defaults_come_back():
    took, kept = faults("keep")
    if not took:
        pytest.skip("another C library")
    pages = 4 * 2 * 2**25 // 4096
    assert kept < pages / 20
    assert (
        faults("keep", "stock")[1] > pages / 4
    )  # huge pages, where there are some, make fewer faults


def test_another_system_is_left_alone(monkeypatch):
    monkeypatch.setattr(runtime.sys, "platform", "darwin")
    assert runtime.keep_freed_memory() is False


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(runtime.sys, "platform", "linux")
    monkeypatch.setattr(runtime.ctypes, "CDLL", lambda _: object())
    assert runtime.keep_freed_memory() is False


def test_the_revision_is_of_our_own_checkout_or_none(monkeypatch):
    def absent(*_, **__):
        raise FileNotFoundError("git")

    def outside(*_, **__):
        raise subprocess.CalledProcessError(128, "git")

    def another(*_, **__):  # installed in an environment inside somebody's repository
        return subprocess.CompletedProcess([], 0, stdout="/somewhere/else\n")

    for run in (absent, outside, another):
        monkeypatch.setattr(runtime.subprocess, "run", run)
        assert runtime.revision() is None
