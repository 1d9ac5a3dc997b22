"""`bench --launcher ray` on a real Ray of two workers, one of which is killed while it computes."""

import subprocess
import sys
import time

import psutil
import pytest

from bayestune.evaluation import read_records
from benching import furnish
from running import environment
from tiny import byte_level_tokenizer, tiny_llama

pytestmark = pytest.mark.stacks

RUN = """
import sys
from pathlib import Path
import ray
from bayestune.bench import run_bench
from benching import small
place = Path(sys.argv[1])
ray.init(num_cpus=2, include_dashboard=False)
sys.exit(run_bench(small(place), place / "out", launcher="ray"))
"""


def working(run):
    """The workers that compute a cell now: Ray names their processes after the task."""
    found = []
    for process in psutil.Process(run.pid).children(recursive=True):
        try:
            if process.cmdline()[:1] == ["ray::compute_key"]:
                found.append(process)
        except psutil.Error:  # it has ended
            continue
    return found


def test_a_cell_whose_worker_is_killed_is_computed_again(tmp_path):
    place = furnish(tmp_path, tiny_llama(), byte_level_tokenizer())
    command = [sys.executable, "-c", RUN, place]
    with (place / "log").open("w") as log:
        run = subprocess.Popen(command, stdout=log, stderr=log, env=environment(RAY_DEDUP_LOGS="0"))
    try:
        killed = None
        until = time.monotonic() + 400
        while run.poll() is None and time.monotonic() < until:
            # a checkpoint is there and no cell is: a fit is going on
            begun = any((place / "out" / "fits").glob("*/checkpoints/checkpoint-*"))
            if killed is None and begun and not any((place / "out" / "cells").glob("*")):
                killed = working(run)[0]
                killed.kill()
            time.sleep(0.02)
        code = run.poll()
    finally:
        run.kill()
    said = (place / "log").read_text(encoding="utf-8")
    assert killed is not None, said[-3000:]
    assert code == 0, said[-3000:]
    labels = {record["label"] for record in read_records(place / "out")}
    assert labels == {
        "MLE",
        "TFB on MLE N=0",
        "TFB on MLE N=2",
        "BLoB, small N=0",
        "BLoB, small N=2",
    }
    assert not any((place / "out").glob("failed/*"))
