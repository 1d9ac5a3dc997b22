"""Random factors on A's ranks: one a row in training, their mean in evaluation and afterwards."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from torch.testing import assert_close

from bayestune.adapters import (
    RankLinear,
    RowGroups,
    Slots,
    TrainingPasses,
    group_rows,
    make_ranks_random,
    put_means,
)
from tiny import BATCH, CLOSE, adapted, end_logits, tiny_llama


class Counted(RankLinear):
    """Factors that tell the row: n + 1 in row n; their mean is said to be 1, 2, 3, …."""

    @property
    def mean_factors(self) -> torch.Tensor:
        return torch.arange(1.0, 1 + self.out_features)

    def noise(self, num_rows: int) -> torch.Tensor:
        return torch.arange(1.0, 1 + num_rows)[:, None].expand(-1, self.out_features)

    def factors(self, noise: torch.Tensor) -> torch.Tensor:
        return noise


@pytest.mark.parametrize("shape", [(4, 6), (4, 5, 6)])
def test_a_factor_is_a_rows_in_training_and_a_ranks_mean_in_evaluation(shape):
    plain = nn.Linear(6, 3, bias=False)
    layer = Counted(plain, TrainingPasses(RowGroups(2)))
    assert layer.weight is plain.weight
    x = torch.randn(shape)
    output = linear(x, plain.weight)
    assert torch.equal(layer(x)[:2], output[:2])
    assert torch.equal(layer(x)[2:], 2 * output[2:])
    assert torch.equal(layer.eval()(x), output * torch.tensor([1.0, 2.0, 3.0]))


def test_ranks_are_made_random_in_every_layer_and_put_back_as_their_mean():
    model = adapted(tiny_llama(), r=3)
    layers = make_ranks_random(model, Counted)
    assert Slots(model).of_kind(RankLinear) == layers
    assert len(layers) == 4
    with torch.no_grad():
        mean = end_logits(model, BATCH)
        model.train()
        group_rows(model, 2)
        assert not torch.allclose(end_logits(model, BATCH), mean, atol=1e-3)
        put_means(model, layers)
        assert not Slots(model).of_kind(RankLinear)
        assert_close(end_logits(model.eval(), BATCH), mean, **CLOSE)
    make_ranks_random(model, Counted)
    with pytest.raises(ValueError, match="its lora_A is a Counted, not a plain Linear"):
        make_ranks_random(model, Counted)
