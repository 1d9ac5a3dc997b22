"""Which draws, how many of them at once, and what a batch's rows and tokens are."""

import pytest
import torch
from torch import nn

from bayestune.forward import Draws, on_device, repeat_rows, seeded
from bayestune.forward.draws import device_of

IDS = {"input_ids": torch.zeros(4, 9, dtype=torch.long), "extra": torch.zeros(1)}
EMBEDDINGS = {"extra": torch.zeros(1), "inputs_embeds": torch.zeros(4, 9, 5)}
PLAIN = {"x": torch.zeros(4, 5)}


@pytest.mark.parametrize(
    ("bounds", "batch", "at_once"),
    [
        ({}, IDS, 10),
        ({"max_rows": 13}, IDS, 3),
        ({"max_rows": 13}, PLAIN, 3),
        ({"max_tokens": 4 * 9 * 5}, IDS, 5),
        ({"max_tokens": 4 * 9 * 5}, EMBEDDINGS, 5),
        ({"max_tokens": 4 * 5}, PLAIN, 5),
        ({"max_tokens": 4 * 9 * 5, "max_rows": 8}, IDS, 2),
        ({"max_tokens": 1, "max_rows": 1}, IDS, 1),
    ],
)
def test_bounds_bound_the_rows_and_tokens_of_a_pass_down_to_one_draw(bounds, batch, at_once):
    assert Draws(10, **bounds).at_once(batch) == at_once


def test_later_draws_have_later_indices():
    assert list(Draws(3, first=5).indices) == [5, 6, 7]
    assert not Draws(0).indices


@pytest.mark.parametrize("wrong", [{"count": -1}, {"first": -1}])
def test_draws_are_counted_from_zero(wrong):
    with pytest.raises(ValueError, match="expected neither to be negative; count=0 means the mean"):
        Draws(**wrong)


def test_rows_are_repeated_copy_by_copy():
    repeated = repeat_rows({"a": torch.tensor([1, 2]), "b": torch.tensor([[1], [2]])}, 2)
    assert repeated["a"].tolist() == [1, 2, 1, 2]
    assert repeated["b"].tolist() == [[1], [2], [1], [2]]


def test_a_batch_goes_where_the_model_is():
    model = nn.Sequential(nn.Identity(), nn.Sequential(nn.Linear(2, 2))).to("meta")
    assert device_of(model).type == "meta"
    assert on_device(PLAIN, model)["x"].device.type == "meta"


def test_seeded_noise_is_a_function_of_seed_and_index_and_leaves_the_generator_alone():
    model = nn.Linear(2, 2)
    state = torch.get_rng_state()
    values = []
    for address in ((0, 0), (0, 1), (1, 0), (0, 0)):
        with seeded(model, *address):
            values.append(torch.rand(1).item())
    assert torch.equal(torch.get_rng_state(), state)
    assert values[0] == values[3]
    assert len(set(values)) == 3
