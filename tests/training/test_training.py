"""The engine: exact accumulation, seeds, checkpoints that resume bit for bit, and loud failures."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import TrainerCallback

from bayestune.adapters import GaussianLinear, Lora, Slots, bayesify
from bayestune.data import Question
from bayestune.errors import Refusal
from bayestune.kl import KLStep
from bayestune.runtime import keep_freed_memory, peak_memory_mb, reset_peak_memory
from bayestune.training import (
    NotFiniteError,
    Training,
    adamw,
    fit_adapter,
    newest_checkpoint,
    start_adapter,
)
from promises import Case

SETTINGS = Training(
    lora=Lora(targets=("q_proj", "v_proj")),
    steps=6,
    learning_rate=1e-2,
    progress=False,
    logging_steps=1,
)


@pytest.fixture(scope="module")
def case():
    return Case("letter")


def run(case, callbacks=(), **changes):
    return fit_adapter(case.make(), case.scorer, replace(SETTINGS, **changes), callbacks)


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(model, other):
    values = trained(other)
    return all(torch.equal(value, values[name]) for name, value in trained(model).items())


def test_a_step_is_one_on_the_mean_loss_of_its_rows(case):
    whole, expected = run(case, batch_size=4, steps=3)
    for batch_size, accumulation in ((2, 2), (1, 4)):
        model, report = run(case, batch_size=batch_size, accumulation=accumulation, steps=3)
        for line, other in zip(report.history[:3], expected.history[:3], strict=True):
            assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)
        for name, value in trained(model).items():
            torch.testing.assert_close(value, trained(whole)[name], atol=2e-5, rtol=1e-3)


def test_the_first_loss_is_the_cross_entropy_of_the_options(case):
    batch, labels = case.collate(case.task.train)
    with torch.no_grad():
        expected = F.cross_entropy(case.scorer(case.make(), batch), labels)
    report = run(case, batch_size=12, steps=1)[1]
    assert report.history[0]["loss"] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [({}, 6), ({"epochs": 3}, 9), ({"epochs": 2, "batch_size": 2, "accumulation": 2}, 6)],
)
def test_epochs_are_turned_into_steps(changes, steps):
    assert replace(SETTINGS, **changes).total_steps(10) == steps


def test_preparing_comes_before_training_and_the_seed_decides_all(case):
    fits = []
    for seed in (1, 1, 2):
        training = replace(SETTINGS, seed=seed)
        model, _ = fit_adapter(case.make(), case.scorer, training, prepare=bayesify)
        assert Slots(model).of_kind(GaussianLinear)
        fits.append(model)
    assert same(fits[0], fits[1])
    assert not same(fits[0], fits[2])


def test_adamw_gives_some_parameters_a_rate_of_their_own_and_no_decay(case):
    model = start_adapter(case.make(), SETTINGS)
    bayesify(model)
    model.register_parameter("scale", torch.nn.Parameter(torch.ones(3)))
    made = adamw(replace(SETTINGS, weight_decay=0.1), ["root_std"], 0.5)(model)
    groups = [(g["lr"], g["weight_decay"], len(g["params"])) for g in made.param_groups]
    assert groups == [(1e-2, 0.1, 8), (1e-2, 0.0, 1), (0.5, 0.0, 4)]


# Memory


class Hungry(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        torch.ones(2**26)  # 256 MiB


def test_a_small_fit_after_a_big_one_reports_its_own_peak(case):
    keep_freed_memory(False)
    _, big = run(case, [Hungry()])
    _, small = run(case)
    reset_peak_memory()
    if peak_memory_mb() == big.peak_memory_mb:
        pytest.skip("this system cannot reset the peak")
    assert 0 < small.peak_memory_mb < big.peak_memory_mb - 200


# Failures


class Poison(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 4:
            next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(case, tmp_path):
    message = "the loss is nan at step 5 of 9; training stopped, checkpoints in"
    with pytest.raises(NotFiniteError, match=message):
        run(case, [Poison()], steps=9, save_steps=2, output=tmp_path)
    assert newest_checkpoint(tmp_path).name in ("checkpoint-2", "checkpoint-4")


def test_a_checkpoint_that_a_kill_cut_short_is_passed_over(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    for step, whole in ((2, True), (10, True), (12, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if whole:
            (folder / "trainer_state.json").write_text("{}")
    assert newest_checkpoint(tmp_path).name == "checkpoint-10"


def test_a_resumed_run_goes_on_with_its_own_checkpoints(case, tmp_path):
    """A run that was started anew in the folder of a longer one, and then was cut off."""
    run(case, steps=8, save_steps=4, output=tmp_path)
    _, report = run(case, steps=6, save_steps=2, output=tmp_path, learning_rate=0.02)
    assert report.steps == 6
    shutil.rmtree(tmp_path / "checkpoint-6")
    assert newest_checkpoint(tmp_path).name == "checkpoint-4"
    run(case, steps=6, save_steps=6, output=tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-6")
    assert newest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("prepare", [None, bayesify])
def test_a_run_is_not_resumed_over_a_base_that_was_retrained_in_place(prepare, tmp_path):
    case = Case("head")  # a head starts anew each time, and is none of the base's
    base = case.make()

    def fit(**changes):
        lora = Lora(targets=("query", "value"))
        training = replace(SETTINGS, lora=lora, output=tmp_path, save_steps=2, **changes)
        fit_adapter(base, case.scorer, training, prepare=prepare)

    fit(steps=4)
    base = case.make()
    torch.nn.init.normal_(base.classifier.weight)
    fit(steps=6, resume=True)
    base = case.make()
    with torch.no_grad():
        for parameter in base.bert.parameters():
            parameter.mul_(1.01)
    with pytest.raises(Refusal, match=r"got a base model with another \S*embeddings.weight"):
        fit(steps=8, resume=True)


def test_nothing_to_learn_from_is_refused(case):
    row = Question("a", "what is red?", ("red", "green"), 0)
    scorer = replace(case.scorer, task=replace(case.task, train=(row, row)))
    message = "have the same answer, option 0: got one class, expected two"
    with pytest.raises(ValueError, match=message):
        fit_adapter(case.make(), scorer, SETTINGS)


# Resuming: the same run in one piece, and killed and gone on with


def start(folder, *words):
    program = [sys.executable, "-W", "ignore", Path(__file__).parents[1] / "resuming.py"]
    return subprocess.Popen([*program, folder, *words], env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_a_run_killed_in_the_middle_ends_bit_identical_to_an_uninterrupted_one(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait(120) == 0
    process = start(killed, "slow")
    deadline = time.monotonic() + 120
    while newest_checkpoint(killed) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    assert not (killed / "final.safetensors").exists()
    assert start(killed, "resume").wait(120) == 0
    assert (killed / "final.safetensors").read_bytes() == (whole / "final.safetensors").read_bytes()
    first, second = (json.loads((folder / "log.json").read_text()) for folder in (whole, killed))
    assert first[-1]["kl_time"] == second[-1]["kl_time"]
    assert first[-1]["kl"] == second[-1]["kl"]


def test_a_checkpoint_carries_the_posterior(case, tmp_path):
    training = replace(SETTINGS, steps=4, save_steps=4, output=tmp_path)
    callbacks = [KLStep(final_std=0.1)]
    model, _ = fit_adapter(case.make(), case.scorer, training, callbacks, prepare=bayesify)
    other = start_adapter(case.make(), training)
    bayesify(other)
    other.load_adapter(tmp_path / "checkpoint-4", "default", is_trainable=True)
    assert same(model, other)
