"""`accelerate launch -m bayestune fit` in two processes against the same command in one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from bayestune import load_posterior
from bayestune.evaluation import read_records
from running import fitting, furnish
from tiny import byte_level_tokenizer, tiny_llama

pytestmark = pytest.mark.stacks

FIT = {"batch_size": 4, "accumulation": 1, "steps": 6, "logging_steps": 1, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("launch"), tiny_llama(), byte_level_tokenizer())


def launched(processes, arguments, run=("-m", "bayestune")):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines=1"]
        command += [f"--num_processes={processes}", f"--main_process_port={port}"]
        command += ["--num_cpu_threads_per_process=1"]
    command += [*run, *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )


def fit(place, processes, output, **options):
    done = launched(processes, fitting(place, output=output, **{**FIT, **options}))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("posterior in") == 1
    return place / output


def losses(folder):
    history = json.loads((folder / "training.json").read_text(encoding="utf-8"))["history"]
    return [line["loss"] for line in history if "loss" in line]


@pytest.mark.parametrize("grouped", ["false", "true"])
def test_two_processes_train_as_one_does(grouped, place):
    more = {"method": "mle", "group_by_length": grouped}
    alone = fit(place, 1, f"alone-{grouped}", **more)
    two = fit(place, 2, f"two-{grouped}", **more)
    assert len(losses(alone)) == 6
    assert_close(losses(two), losses(alone), rtol=1e-4, atol=1e-5)
    one = load_file(alone / "adapter_model.safetensors")
    assert_close(load_file(two / "adapter_model.safetensors"), one, rtol=1e-3, atol=1e-5)


def test_the_standard_deviation_ends_where_it_is_told_in_two_processes_too(place):
    folder = fit(place, 2, "blob", **{"method": "blob", "blob.final_std": 0.1})
    roots = load_file(folder / "posterior.safetensors").values()
    std = torch.cat([root.square().flatten() for root in roots]).mean().item()
    assert_close(std, 0.1, rtol=0.05, atol=0.0)
    assert load_posterior(tiny_llama(), folder).draw(0)
    rows = f"--evaluation_data={place / 'test.jsonl'}"
    few = "--prediction_batch=2"  # so that there are three batches, two of them one process's
    told = []
    printed = []
    for processes in (1, 2):
        output = place / f"evaluated-{processes}"
        given = ["evaluate", f"--posterior={folder}", rows, few, f"--output={output}"]
        done = launched(processes, [*given, "--draws=[0,3]"])
        assert done.returncode == 0, done.stderr[-3000:]
        printed.append(done.stdout.count("BLoB N=3"))
        told.append(read_records(output))
    assert printed[0] == printed[1] > 0  # one process prints
    assert [record["draws"] for record in told[0]] == [0, 3]
    for alone, together in zip(*told, strict=True):
        assert alone["metrics"] == together["metrics"]
        files = (place / f"evaluated-{n}" / alone["predictions"] for n in (1, 2))
        assert len({file.read_text(encoding="utf-8") for file in files}) == 1


def test_a_bare_script_is_launched(place):
    script = Path(__file__).parents[2] / "examples/accelerate_fit.py"
    output = place / "scripted"
    given = [f"--model={place / 'model'}", f"--output={output}", "--steps=2"]
    done = launched(2, given, run=(str(script),))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("posterior in") == 1
    assert load_posterior(tiny_llama(), output).draw(0)


def test_a_batch_that_two_processes_cannot_share_is_refused(place):
    done = launched(2, fitting(place, "fit", "refused", **{**FIT, "batch_size": 3}))
    assert done.returncode
    assert "batch_size 3, expected a multiple of 2" in done.stderr
    assert not (place / "refused" / "posterior.json").exists()


def test_what_the_first_process_refuses_all_refuse(place):
    (place / "full").mkdir()
    (place / "full/notes.txt").write_text("mine")
    done = launched(2, fitting(place, "fit", "full", **FIT))
    assert done.returncode
    assert "full is not empty: choose another --output" in done.stderr
    assert "unexpected" not in done.stderr


def test_a_command_that_two_processes_cannot_share_is_refused(place):
    done = launched(2, ["calibrate", place / "blob", f"--rows={place / 'test.jsonl'}"])
    assert done.returncode
    assert "alone: got 2 for 'calibrate', expected one; start it without" in done.stderr
