"""The layers: the mean in evaluation, one draw a row in training, S stacks in prediction."""

import math

import pytest
import torch
from torch import nn

from bayestune.adapters import GaussianLinear, RowGroups
from bayestune.adapters.drawn_linear import DrawnLinear
from tiny import row_weights

NOISES = ["row", "independent", "token"]


def layer(noise="row", width=6, rank=3, init=0.7, groups=None) -> GaussianLinear:
    torch.manual_seed(5)
    return GaussianLinear(nn.Linear(width, rank, bias=False), init, noise, groups).double()


def test_the_weight_is_the_linear_layers_own_parameter():
    linear = nn.Linear(4, 2, bias=False)
    gaussian = GaussianLinear(linear)
    assert gaussian.weight is linear.weight
    assert [name for name, _ in gaussian.named_parameters()] == ["weight", "root_std"]


def test_the_standard_deviation_starts_where_the_paper_starts_it():
    root = GaussianLinear(nn.Linear(400, 400, bias=False), 0.05).root_std
    low, high = 0.05 / math.sqrt(2), 0.05
    assert low <= root.min()
    assert root.max() <= high
    error = (high - low) / math.sqrt(12 * root.numel())
    assert root.mean().item() == pytest.approx((low + high) / 2, abs=4 * error)


@pytest.mark.parametrize("noise", NOISES)
def test_evaluation_is_the_mean(noise):
    module, x = layer(noise).eval(), torch.randn(2, 5, 6, dtype=torch.float64)
    assert torch.equal(module(x), nn.functional.linear(x, module.weight))


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("shape", [(3, 6), (3, 4, 6)])
def test_training_has_the_posteriors_moments(noise, shape):
    module, x = layer(noise).train(), torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        samples = torch.stack([module(x) for _ in range(4000)])
    mean = nn.functional.linear(x, module.weight)
    variance = nn.functional.linear(x.square(), module.std.square())
    assert ((samples.mean(0) - mean) / (variance / 4000).sqrt()).abs().max() < 4.5
    # kurtosis of a product of normal and sign sums is at most 3 + 6 here; its error bound is generous, not blind
    assert (samples.var(0) / variance - 1).abs().max() < 4.5 * math.sqrt(3 / 4000)


def correlation(noise: str, pick) -> float:
    module = layer(noise, width=32).train()
    row = torch.randn(1, 1, 32, dtype=torch.float64)
    x = row.expand(2, 2, 32)  # the same token everywhere: only the noise can differ
    with torch.no_grad():
        noises = torch.stack(
            [module(x) - nn.functional.linear(x, module.weight) for _ in range(3000)]
        )
    first, second = pick(noises)
    return torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1].item()


@pytest.mark.parametrize(
    ("noise", "expected"), [("row", 1.0), ("independent", 1.0), ("token", 0.0)]
)
def test_tokens_of_a_row_share_a_draw_unless_signs_are_per_token(noise, expected):
    found = correlation(noise, lambda z: (z[:, 0, 0], z[:, 0, 1]))
    assert found == pytest.approx(expected, abs=4.5 / math.sqrt(9000))


@pytest.mark.parametrize("noise", NOISES)
def test_rows_do_not_share_a_draw(noise):
    assert correlation(noise, lambda z: (z[:, 0, 0], z[:, 1, 0])) == pytest.approx(
        0, abs=4.5 / math.sqrt(9000)
    )


def test_sequences_of_a_group_share_their_draw_and_groups_do_not():
    module = layer(groups=RowGroups(3)).train()
    x = torch.randn(1, 4, 6, dtype=torch.float64).expand(6, 4, 6)
    y = module(x)
    assert torch.equal(y[0], y[1])
    assert torch.equal(y[0], y[2])
    assert torch.equal(y[3], y[5])
    assert not torch.allclose(y[0], y[3])


def test_a_batch_that_does_not_divide_into_groups_is_refused():
    with pytest.raises(ValueError, match="got 4 sequences, expected a multiple of 3"):
        layer(groups=RowGroups(3)).train()(torch.randn(4, 2, 6, dtype=torch.float64))


def test_gradients_are_those_of_the_draw_that_was_used():
    module, x = layer().train(), torch.randn(2, 3, 6, dtype=torch.float64)
    torch.manual_seed(11)
    cotangent = torch.randn(2, 3, 3, dtype=torch.float64)

    def loss() -> torch.Tensor:
        torch.manual_seed(7)
        return (module(x) * cotangent).sum()

    loss().backward()
    for parameter in (module.weight, module.root_std):
        with torch.no_grad():
            at, step = (1, 2), 1e-6
            parameter[at] += step
            up = loss()
            parameter[at] -= 2 * step
            down = loss()
            parameter[at] += step
        assert parameter.grad[at].item() == pytest.approx(
            ((up - down) / (2 * step)).item(), rel=1e-5
        )


@pytest.mark.parametrize("bf16", [False, True])
def test_the_written_out_backward_pass_is_autograds_of_the_plain_form(bf16):
    module, x = layer().float().train(), torch.randn(3, 4, 6, requires_grad=True)
    cotangent = torch.randn(3, 4, 3)

    def gradients(plain: bool) -> list[torch.Tensor]:
        torch.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            y = (
                torch.bmm(x, row_weights(module.weight, module.std, 3).transpose(1, 2))
                if plain
                else module(x)
            )
        return [y, *torch.autograd.grad((y * cotangent).sum(), (x, module.weight, module.root_std))]

    for ours, theirs in zip(gradients(plain=False), gradients(plain=True), strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=1e-5 if not bf16 else 2e-2, atol=1e-6 if not bf16 else 2e-2
        )
        assert ours.dtype == theirs.dtype


@pytest.mark.parametrize(
    ("noise", "extra"), [("row", False), ("independent", False), ("token", True)]
)
def test_only_per_token_signs_store_tensors_of_the_activations_size(noise, extra):
    rows, tokens, width = 2, 512, 64
    x = torch.randn(rows, tokens, width, requires_grad=True)

    def saved(module: nn.Module) -> int:
        sizes: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (
                sizes.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) and t
            ),
            lambda t: t,
        ):
            module(x)
        return sum(sizes.values())

    linear = nn.Linear(width, 4, bias=False)
    ours = saved(GaussianLinear(linear, 0.1, noise).train())
    activation = rows * tokens * width * 4
    assert (ours - saved(linear) > activation / 2) is extra


def test_a_drawn_layer_applies_each_draw_to_its_rows():
    weights, x = torch.randn(3, 2, 5), torch.randn(6, 4, 5)
    y = DrawnLinear(weights)(x)
    for draw in range(3):
        torch.testing.assert_close(
            y[2 * draw : 2 * draw + 2], x[2 * draw : 2 * draw + 2] @ weights[draw].T
        )
    torch.testing.assert_close(DrawnLinear(weights)(x[:, 0]), y[:, 0])


def test_rows_that_do_not_divide_into_draws_are_refused():
    with pytest.raises(ValueError, match="got 4 rows, expected a multiple of 3"):
        DrawnLinear(torch.zeros(3, 2, 5))(torch.zeros(4, 1, 5))


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="unknown noise: got 'rows', expected one of"):
        GaussianLinear(nn.Linear(2, 2, bias=False), noise="rows")
    with pytest.raises(ValueError, match="init_root_std must be positive: got 0"):
        GaussianLinear(nn.Linear(2, 2, bias=False), init_root_std=0)


def test_a_stack_is_held_in_the_type_its_product_is_computed_in():
    stack, weight = torch.randn(2, 3, 4), torch.zeros(3, 4)
    assert DrawnLinear.of(stack, like=weight).weight.dtype is torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        drawn, x = DrawnLinear.of(stack, like=weight), torch.randn(2, 5, 4)
        assert drawn.weight.dtype is torch.bfloat16
        assert torch.equal(
            drawn(x), DrawnLinear(stack)(x)
        )  # what autocast makes of a float32 stack
