"""Sequences of one row share their draw, for one training pass of the model."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from bayestune.adapters import GaussianLinear, RowGroups, Slots, bayesify, evaluating, group_rows
from tiny import BATCH, converted, tiny_llama, with_second

ALIKE = {"input_ids": BATCH["input_ids"][:1].repeat(4, 1)}


@pytest.fixture
def model() -> nn.Module:
    """A Gaussian adapter in training mode."""
    return converted(tiny_llama()).train()


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**ALIKE).logits[:, -1]


def shared(rows: torch.Tensor) -> list[bool]:
    """Whether each of four alike sequences saw the draw of the first."""
    return [torch.equal(row, rows[0]) for row in rows]


def test_sequences_that_do_not_divide_into_rows_are_refused():
    assert RowGroups(3).rows(6).num_rows == 2
    with pytest.raises(ValueError, match="got 4 sequences, expected a multiple of 3"):
        RowGroups(3).rows(4)


def test_a_row_shares_its_draw_in_every_adapter_for_one_pass():
    model = with_second(converted(tiny_llama()))
    bayesify(model, init_root_std=0.5, adapter="b")
    model.base_model.set_adapter(["default", "b"])
    model.train()
    group_rows(model, 2)
    first = outputs(model)
    assert shared(first) == [True, True, False, False]
    assert torch.equal(first[2], first[3])
    assert shared(outputs(model)) == [True, False, False, False]


def test_evaluation_passes_in_between_do_not_use_the_size_up(model):
    group_rows(model, 2)
    with evaluating(model):
        group_rows(model, 4)  # the mean does not ask
        assert shared(outputs(model)) == [True] * 4
    assert shared(outputs(model)) == [True, True, False, False]
    assert shared(outputs(model)) == [True, False, False, False]


def test_a_size_that_is_asked_for_twice_is_the_last_one(model):
    group_rows(model, 2)
    group_rows(model, 4)
    assert shared(outputs(model)) == [True] * 4


def test_a_checkpoints_recomputation_finds_the_groups_of_its_pass(model):
    gradients = []
    for checkpointing in (False, True):
        twin = copy.deepcopy(model)
        if checkpointing:
            twin.gradient_checkpointing_enable({"use_reentrant": False})
            twin.enable_input_require_grads()
        group_rows(twin, 2)
        torch.manual_seed(4)
        loss = twin(**BATCH, labels=BATCH["input_ids"]).loss
        group_rows(twin, 1)  # asked for before the recomputation, meant for the pass after
        loss.backward()
        layers = Slots(twin).of_kind(GaussianLinear)
        gradients.append([layer.root_std.grad for layer in layers.values()])
    assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_a_copy_of_a_model_has_groups_of_its_own(model):
    twin = copy.deepcopy(model)
    group_rows(model, 2)
    assert shared(outputs(twin)) == [True, False, False, False]
    assert shared(outputs(model)) == [True, True, False, False]
