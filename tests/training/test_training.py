"""The engine: exact accumulation, seeds, checkpoints that resume bit for bit, and loud failures."""

import itertools
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

from bayestune.adapters import Lora, bayesify, gaussian_layers
from bayestune.data import Question, Task
from bayestune.kl import KLStep
from bayestune.scoring import make_scorer
from bayestune.training import Training, start_adapter, train
from bayestune.training.callbacks import NotFiniteError
from bayestune.training.length_groups import by_length
from bayestune.training.training import newest_checkpoint

SETTINGS = Training(
    lora=Lora(targets=("q_proj", "v_proj")),
    steps=6,
    learning_rate=1e-2,
    progress=False,
    logging_steps=1,
)


@pytest.fixture
def scorer(llama, byte_level, tiny_task):
    return make_scorer(llama(), byte_level, tiny_task, "letter")


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def run(base, scorer, **changes):
    training = replace(SETTINGS, **changes)
    model = start_adapter(base, training)
    return model, train(model, scorer, training)


def test_a_step_is_one_on_the_mean_loss_of_its_rows(llama, scorer):
    losses = []
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
        model, fitted = run(
            llama(), scorer, batch_size=batch_size, accumulation=accumulation, steps=3
        )
        losses.append(
            ([entry["loss"] for entry in fitted.history if "loss" in entry], trained(model))
        )
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


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(
    llama, scorer, tmp_path
):
    from transformers import TrainerCallback

    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 4:
                next(iter(p for p in model.parameters() if p.requires_grad)).data.fill_(
                    float("nan")
                )

    training = replace(SETTINGS, steps=9, save_steps=2, output=tmp_path)
    model = start_adapter(llama(), training)
    with pytest.raises(
        NotFiniteError, match="the loss is nan at step 5 of 9; training stopped, checkpoints in"
    ):
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
    with pytest.raises(
        ValueError, match="have the same answer, option 0: got one class, expected two"
    ):
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


# The order of rows: batches by length


def batches_of(order, size):
    return [tuple(order[i : i + size]) for i in range(0, len(order), size)]


def padding(order, lengths, size):
    return sum(len(rows) * max(lengths[i] for i in rows) for rows in batches_of(order, size)) / sum(
        lengths
    )


@pytest.fixture
def lengths():
    generator = torch.Generator().manual_seed(3)
    return torch.randint(20, 200, (241,), generator=generator).tolist()


def test_batches_by_length_hold_every_row_once_and_pad_little(lengths):
    for epoch in range(3):
        order = by_length(lengths, 4, seed=1, epoch=epoch)
        assert sorted(order) == list(range(241))
        assert padding(order, lengths, 4) < 1.06
        assert padding(torch.randperm(241).tolist(), lengths, 4) > 1.3


def test_batches_by_length_come_in_no_order_of_length_and_differ_from_epoch_to_epoch(lengths):
    orders = [by_length(lengths, 4, seed=1, epoch=epoch) for epoch in range(20)]
    means = torch.tensor(
        [[sum(lengths[i] for i in rows) / 4 for rows in batches_of(o, 4)[:60]] for o in orders]
    )
    place = torch.arange(60.0)
    assert (
        torch.corrcoef(torch.stack([place, means.mean(0)]))[0, 1].abs() < 0.4
    )  # 3 standard errors of none
    seen = [{frozenset(rows) for rows in batches_of(order, 4)} for order in orders]
    assert max(len(one & other) for one, other in itertools.pairwise(seen)) <= 3
    assert len({order[-1] for order in orders}) > 10  # the row that is left over is any row


def test_order_by_length_is_the_seed_s_and_the_epoch_s(lengths):
    first = by_length(lengths, 4, seed=1, epoch=2)
    assert by_length(lengths, 4, seed=1, epoch=2) == first
    assert by_length(lengths, 4, seed=2, epoch=1) != first != by_length(lengths, 4, seed=3, epoch=0)


@pytest.mark.parametrize(("rows", "size"), [(3, 4), (1, 1), (8, 4), (900, 4)])
def test_order_by_length_of_few_rows_and_of_many(rows, size):
    assert sorted(by_length([5] * rows, size, seed=0, epoch=0)) == list(range(rows))


class Watched:
    """A scorer that keeps the batches it is asked for."""

    def __init__(self, scorer):
        self.scorer, self.task, self.seen = scorer, scorer.task, []

    def encode(self, rows):
        encoded = self.scorer.encode(rows)
        self.lengths = [row["length"] for row in encoded]
        return [{**row, "number": i} for i, row in enumerate(encoded)]

    def collate(self, rows):
        self.seen.append([row["number"] for row in rows])
        return self.scorer.collate(rows)

    def __call__(self, model, batch):
        return self.scorer(model, batch)


def test_training_by_length_takes_the_rows_in_that_order(llama, scorer):
    watched = Watched(scorer)
    run(llama(), watched, group_by_length=True, batch_size=2, accumulation=2, steps=6, seed=5)
    expected = [by_length(watched.lengths, 2, seed=5, epoch=epoch) for epoch in range(2)]
    assert [i for batch in watched.seen for i in batch] == expected[0] + expected[1]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    "kept", [2, 5, 6, 8]
)  # within the first epoch, within the second, at its end, in the third
def test_training_by_length_goes_on_with_the_same_rows(llama, scorer, tmp_path, kept, accumulation):
    changes = {
        "group_by_length": True,
        "batch_size": 4 // accumulation,
        "accumulation": accumulation,
        "save_steps": 1,
    }
    changes |= {"steps": 9, "output": tmp_path, "lora": replace(SETTINGS.lora, dropout=0.1)}
    whole = trained(run(llama(), scorer, **changes)[0])
    for folder in tmp_path.glob("checkpoint-*"):
        if int(folder.name.rpartition("-")[2]) > kept:
            shutil.rmtree(folder)
    resumed, fitted = run(llama(), scorer, **changes, resume=True)
    assert fitted.steps == 9
    assert all(torch.equal(value, whole[name]) for name, value in trained(resumed).items())
