"""Batches of rows of like length: every row once, little padding, a reproducible order."""

import itertools
import shutil
from dataclasses import replace

import pytest
import torch

from bayestune.training import fit_adapter
from bayestune.training.length_groups import by_length
from promises import TRAINING, Case


def batches_of(order, size):
    return [tuple(order[i : i + size]) for i in range(0, len(order), size)]


def padding(order, lengths, size):
    padded = sum(len(rows) * max(lengths[i] for i in rows) for rows in batches_of(order, size))
    return padded / sum(lengths)


@pytest.fixture
def lengths():
    generator = torch.Generator().manual_seed(3)
    return torch.randint(20, 200, (241,), generator=generator).tolist()


@pytest.mark.parametrize("epoch", range(3))
def test_every_row_comes_once_and_little_is_padded(lengths, epoch):
    order = by_length(lengths, 4, seed=1, epoch=epoch)
    assert sorted(order) == list(range(241))
    assert padding(order, lengths, 4) < 1.06
    assert padding(torch.randperm(241).tolist(), lengths, 4) > 1.3


def test_batches_come_in_no_order_of_length_and_differ_from_epoch_to_epoch(lengths):
    orders = [by_length(lengths, 4, seed=1, epoch=epoch) for epoch in range(20)]
    in_order = torch.tensor(lengths, dtype=torch.float)[torch.tensor(orders)[:, :240]]
    means = in_order.unflatten(1, (60, 4)).mean((0, 2))
    correlation = torch.corrcoef(torch.stack([torch.arange(60.0), means]))[0, 1]
    assert correlation.abs() < 0.4  # 3 standard errors of none
    seen = [{frozenset(rows) for rows in batches_of(order, 4)} for order in orders]
    assert max(len(one & other) for one, other in itertools.pairwise(seen)) <= 3
    assert len({order[-1] for order in orders}) > 10  # the row that is left over is any row


def test_the_order_is_the_seeds_and_the_epochs(lengths):
    first = by_length(lengths, 4, seed=1, epoch=2)
    assert by_length(lengths, 4, seed=1, epoch=2) == first
    assert by_length(lengths, 4, seed=2, epoch=1) != first != by_length(lengths, 4, seed=3, epoch=0)


@pytest.mark.parametrize(("rows", "size"), [(3, 4), (1, 1), (8, 4), (900, 4)])
def test_few_rows_and_many(rows, size):
    assert sorted(by_length([5] * rows, size, seed=0, epoch=0)) == list(range(rows))


class Watched:
    """A scorer that keeps the rows of the batches it is asked for."""

    def __init__(self, scorer):
        self.scorer = scorer
        self.task = scorer.task
        self.seen = []

    def encode(self, rows):
        encoded = self.scorer.encode(rows)
        self.lengths = [row["length"] for row in encoded]
        return [{**row, "number": i} for i, row in enumerate(encoded)]

    def collate(self, rows):
        self.seen += [row["number"] for row in rows]
        return self.scorer.collate(rows)

    def __call__(self, model, batch):
        return self.scorer(model, batch)


def fit(scorer, **changes):
    training = replace(TRAINING, group_by_length=True, **changes)
    model, report = fit_adapter(Case("letter").make(), scorer, training)
    return [p.detach() for p in model.parameters() if p.requires_grad], report


def test_training_takes_the_rows_in_that_order():
    watched = Watched(Case("letter").scorer)
    fit(watched, batch_size=2, accumulation=2, steps=6, seed=5)
    epochs = [by_length(watched.lengths, 2, seed=5, epoch=epoch) for epoch in range(2)]
    assert watched.seen == epochs[0] + epochs[1]


# checkpoints within the first epoch, within the second, at its end, in the third
@pytest.mark.parametrize("kept", [2, 5, 6, 8])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_goes_on_with_the_same_rows(tmp_path, kept, accumulation):
    scorer = Case("letter").scorer
    changes = {"batch_size": 4 // accumulation, "accumulation": accumulation, "steps": 9}
    changes |= {"save_steps": 1, "output": tmp_path, "lora": replace(TRAINING.lora, dropout=0.1)}
    whole, _ = fit(scorer, **changes)
    for step in range(kept + 1, 10):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    resumed, report = fit(scorer, **changes, resume=True)
    assert report.steps == 9
    assert all(torch.equal(value, whole[i]) for i, value in enumerate(resumed))
