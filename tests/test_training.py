"""The engine: exact accumulation, seeds, checkpoints that resume bit for bit, and loud failures."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from bayestune.kl import KLStep
from bayestune.lora import Lora, bayesify, gaussian_layers
from bayestune.questions import Question
from bayestune.scoring import make_scorer
from bayestune.tasks import Task
from bayestune.training import NotFiniteError, Training, newest_checkpoint, start_adapter, train

SETTINGS = Training(
    lora=Lora(targets=("q_proj", "v_proj")), steps=6, learning_rate=1e-2, progress=False, logging_steps=1
)


@pytest.fixture
def scorer(llama, byte_level, tiny_task):
    return make_scorer(llama(), byte_level, tiny_task, "letter")


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def run(base, scorer, **changes):
    from dataclasses import replace

    training = replace(SETTINGS, **changes)
    model = start_adapter(base, training)
    return model, train(model, scorer, training)


def test_a_step_is_one_on_the_mean_loss_of_its_rows(llama, scorer):
    losses = []
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
        model, fitted = run(llama(), scorer, batch_size=batch_size, accumulation=accumulation, steps=3)
        losses.append(([entry["loss"] for entry in fitted.history if "loss" in entry], trained(model)))
    for history, parameters in losses[1:]:
        assert history == pytest.approx(losses[0][0], rel=1e-4)
        for name, value in parameters.items():
            torch.testing.assert_close(value, losses[0][1][name], atol=2e-5, rtol=1e-3)


def test_the_first_loss_is_the_cross_entropy_of_the_options(llama, scorer, tiny_task):
    base = llama()
    rows = scorer.encode(tiny_task.train)
    batch = scorer.collate(rows)
    with torch.no_grad():
        expected = F.cross_entropy(scorer(base, batch), batch["labels"])
    _, fitted = run(base, scorer, batch_size=12, steps=1)
    assert fitted.history[0]["loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_epochs_are_turned_into_steps():
    from dataclasses import replace

    assert replace(SETTINGS, epochs=3, batch_size=4).total_steps(10) == 9
    assert replace(SETTINGS, epochs=2, batch_size=2, accumulation=2).total_steps(10) == 6
    assert SETTINGS.total_steps(10) == 6


def test_same_seed_same_fit_other_seed_another(llama, scorer):
    first, second, other = (trained(run(llama(), scorer, seed=seed)[0]) for seed in (1, 1, 2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not all(torch.equal(value, other[name]) for name, value in first.items())


def test_the_base_is_left_bit_identical(llama, scorer):
    base = llama()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model, _ = run(base, scorer)
    after = model.unload().state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(llama, scorer, tmp_path):
    from transformers import TrainerCallback

    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 4:
                next(iter(p for p in model.parameters() if p.requires_grad)).data.fill_(float("nan"))

    from dataclasses import replace

    training = replace(SETTINGS, steps=9, save_steps=2, output=tmp_path)
    model = start_adapter(llama(), training)
    with pytest.raises(NotFiniteError, match="the loss is nan at step 5 of 9; training stopped, checkpoints in"):
        train(model, scorer, training, [Poison()])
    kept = newest_checkpoint(tmp_path)
    assert kept is not None
    assert kept.name == "checkpoint-2" or kept.name == "checkpoint-4"


def test_a_checkpoint_that_a_kill_cut_short_is_passed_over(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    for step, whole in ((2, True), (10, True), (12, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if whole:
            (folder / "trainer_state.json").write_text("{}")
    assert newest_checkpoint(tmp_path).name == "checkpoint-10"


def test_nothing_to_learn_from_is_refused(llama, byte_level):
    row = Question("a", "what is red?", ("red", "green"), 0)
    one_class = Task("one", (row, row), (row,))
    with pytest.raises(ValueError, match="have the same answer, option 0: got one class, expected two"):
        run(llama(), make_scorer(llama(), byte_level, one_class))


# Resuming: the same run in one piece, and killed and gone on with

SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import resuming
resuming.run(Path(sys.argv[1]), resume=sys.argv[2] == "resume", slow=sys.argv[3] == "slow")
"""


def start(folder: Path, resume: bool, slow: bool) -> subprocess.Popen:
    script = SCRIPT.format(tests=str(Path(__file__).parent))
    words = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        script,
        str(folder),
        "resume" if resume else "",
        "slow" if slow else "",
    ]
    return subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_a_run_killed_in_the_middle_ends_bit_identical_to_an_uninterrupted_one(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole, False, False).wait(120) == 0
    process = start(killed, False, True)
    deadline = time.monotonic() + 120
    while newest_checkpoint(killed) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    assert not (killed / "final.safetensors").exists()
    assert start(killed, True, False).wait(120) == 0
    assert (killed / "final.safetensors").read_bytes() == (whole / "final.safetensors").read_bytes()
    first, second = (json.loads((folder / "log.json").read_text()) for folder in (whole, killed))
    assert first[-1]["kl_time"] == second[-1]["kl_time"]
    assert first[-1]["kl"] == second[-1]["kl"]


def test_a_checkpoint_carries_the_posterior(llama, scorer, tmp_path):
    from dataclasses import replace

    training = replace(SETTINGS, steps=4, save_steps=4, output=tmp_path)
    model = start_adapter(llama(), training)
    bayesify(model)
    train(model, scorer, training, [KLStep(final_std=0.1)])
    other = start_adapter(llama(), training)
    bayesify(other)
    other.load_adapter(tmp_path / "checkpoint-4", "default", is_trainable=True)
    for path, layer in gaussian_layers(model).items():
        assert torch.equal(gaussian_layers(other)[path].root_std, layer.root_std)
        assert torch.equal(gaussian_layers(other)[path].weight, layer.weight)
