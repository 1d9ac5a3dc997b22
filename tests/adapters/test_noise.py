"""The laws of training noise, and held noise, whose bits are a function of its address."""

import math

import pytest
import torch
from torch.testing import assert_close

from bayestune.adapters import held_noise, held_weights
from bayestune.adapters.noise import independent_noise, random_signs
from tiny import row_weights

COUNT = 20_000
FIRST_RELEASE = {  # the bits of three values by seed and index
    (0, 0): ["0x1.f987cc0000000p-1", "-0x1.720f000000000p-2", "0x1.a522280000000p-2"],
    (3, 1): ["0x1.53fe160000000p-1", "0x1.59dcd60000000p-1", "0x1.2785240000000p+0"],
}


def independent_weights(mean: torch.Tensor, std: torch.Tensor, num_rows: int) -> torch.Tensor:
    return mean + std * independent_noise(num_rows, like=mean)


@pytest.fixture
def gaussian() -> tuple[torch.Tensor, torch.Tensor]:
    """M and Ω, (3, 5)."""
    torch.manual_seed(3)
    mean = torch.randn(3, 5, dtype=torch.float64)
    return mean, torch.rand(3, 5, dtype=torch.float64) * 0.3 + 0.05


def test_signs_are_fair_and_of_the_type_that_is_asked_for():
    signs = random_signs(100, 200, like=torch.zeros(1, dtype=torch.bfloat16))
    assert signs.dtype is torch.bfloat16
    assert signs.unique().tolist() == [-1, 1]
    assert abs(signs.float().mean()) < 4.5 / math.sqrt(COUNT)


# `row_weights` is the oracle of the layer's noise, so its law is tested as well


@pytest.mark.parametrize("draw", [row_weights, independent_weights])
def test_each_rows_draw_has_the_posterior_as_its_law(draw, gaussian):
    mean, std = gaussian
    samples = torch.cat([draw(mean, std, 4) for _ in range(COUNT)])
    assert ((samples.mean(0) - mean) / (std / math.sqrt(len(samples)))).abs().max() < 4.5
    # rows of one call share |E|, so of four rows one counts for the second moment
    assert (samples.var(0) / std.square() - 1).abs().max() < 4.5 * math.sqrt(2 / COUNT)


@pytest.mark.parametrize("draw", [row_weights, independent_weights])
def test_noises_of_two_rows_and_of_two_entries_are_uncorrelated(draw, gaussian):
    mean, std = gaussian
    noise = torch.stack([(draw(mean, std, 2) - mean) / std for _ in range(COUNT)])
    between_rows = (noise[:, 0] * noise[:, 1]).mean(0)
    between_entries = (noise[:, 0, 0, 0] * noise[:, 0, 1, 1]).mean()
    assert between_rows.abs().max() < 4.5 * math.sqrt(3 / COUNT)  # flipout: E⁴ has mean 3
    assert between_entries.abs() < 4.5 * math.sqrt(1 / COUNT)


def test_flipout_shares_the_size_of_the_noise_and_independent_noise_does_not(gaussian):
    mean, std = gaussian
    first, second = row_weights(mean, std, 2) - mean
    assert_close(first.abs(), second.abs())
    first, second = independent_weights(mean, std, 2) - mean
    assert not torch.allclose(first.abs(), second.abs())


def test_independent_draws_pass_the_gradient_of_the_reparametrisation(gaussian):
    mean, std = (value.requires_grad_() for value in gaussian)
    draws = independent_weights(mean, std, 3)
    cotangent = torch.randn_like(draws)
    gradients = torch.autograd.grad(draws, (mean, std), cotangent)
    noise = ((draws - mean) / std).detach()
    assert_close(gradients, (cotangent.sum(0), (cotangent * noise).sum(0)))


def test_held_noise_is_standard_normal():
    noise = held_noise((200, 500), seed=0, index=0, path="layer")
    count = noise.numel()
    assert noise.dtype == torch.float32
    assert abs(noise.mean()) < 4.5 / math.sqrt(count)
    assert abs(noise.var() - 1) < 4.5 * math.sqrt(2 / count)
    assert abs((noise**4).mean() - 3) < 4.5 * math.sqrt(96 / count)


@pytest.mark.parametrize("other", [(1, 1, "a.b"), (0, 2, "a.b"), (0, 1, "a.c"), (1, 0, "a.b")])
def test_held_noise_depends_on_every_part_of_its_address_and_on_nothing_else(other):
    noise = held_noise((40, 60), 0, 1, "a.b")
    torch.manual_seed(99)
    assert torch.equal(noise, held_noise((40, 60), 0, 1, "a.b"))
    product = noise * held_noise((40, 60), *other)
    assert abs(product.mean()) < 4.5 / math.sqrt(noise.numel())


@pytest.mark.parametrize(("address", "bits"), FIRST_RELEASE.items())
def test_held_noise_has_the_bits_it_had_in_the_first_release(address, bits):
    values = held_noise((1, 3), *address, "model.layers.0.self_attn.q_proj")
    assert [value.hex() for value in values.flatten().tolist()] == bits


def test_held_weights_are_mean_plus_std_times_noise_in_float32(gaussian):
    mean, std = (value.float() for value in gaussian)
    expected = mean + std * held_noise((3, 5), 2, 4, "x")
    assert torch.equal(held_weights(mean, std, 2, 4, "x"), expected)
    assert held_weights(mean.bfloat16(), std, 2, 4, "x").dtype == torch.float32
