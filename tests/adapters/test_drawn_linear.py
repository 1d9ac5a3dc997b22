"""S fixed weights in one product: each draw is applied to its own rows."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from bayestune.adapters import Arrivals, DrawnLinear


def test_each_draw_is_applied_to_its_rows():
    weights = torch.randn(3, 2, 5)
    x = torch.randn(6, 4, 5)
    output = DrawnLinear(weights)(x)
    for draw in range(3):
        rows = slice(2 * draw, 2 * draw + 2)
        assert_close(output[rows], x[rows] @ weights[draw].T)
    assert_close(DrawnLinear(weights)(x[:, 0]), output[:, 0])


def test_rows_that_do_not_divide_into_draws_are_refused():
    with pytest.raises(ValueError, match="got 4 rows, expected a multiple of 3; repeat the batch"):
        DrawnLinear(torch.zeros(3, 2, 5))(torch.zeros(4, 1, 5))


def test_a_stack_is_held_in_the_type_its_product_is_computed_in():
    stack = torch.randn(2, 3, 4)
    slot = nn.Linear(4, 3, bias=False)

    def held(slot):
        return DrawnLinear.of(stack, slot, "slot", Arrivals(2))

    assert held(slot).weight.dtype is torch.float32
    assert held(nn.Linear(4, 3, bias=False).bfloat16()).weight.dtype is torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        drawn = held(slot)
        x = torch.randn(2, 5, 4)
        assert drawn.weight.dtype is torch.bfloat16
        assert torch.equal(drawn(x), DrawnLinear(stack)(x))  # autocast's own rounding


def test_draws_are_no_part_of_a_models_state():
    assert not DrawnLinear(torch.zeros(3, 2, 5)).state_dict()
