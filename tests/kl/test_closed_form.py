"""Closed forms against torch.distributions and autograd; moments within standard errors."""

import math

import pytest
import torch
from torch.distributions import Normal
from torch.distributions import kl_divergence as torch_kl

from bayestune.adapters import held_noise, held_weights
from bayestune.adapters.noise import independent_weights
from bayestune.kl import kl_divergence
from bayestune.kl.closed_form import kl_step_, kl_time_to, rate_to, std_after_steps
from tiny import row_weights


@pytest.fixture
def posterior() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    mean = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    return mean, torch.rand(3, 5, generator=generator, dtype=torch.float64) * 0.3 + 0.05


def test_kl_is_the_sum_of_univariate_divergences(posterior):
    mean, std = posterior
    expected = torch_kl(Normal(mean, std), Normal(torch.zeros_like(mean), 0.2)).sum()
    torch.testing.assert_close(kl_divergence(mean, std, 0.2), expected)


def test_kl_step_is_a_gradient_step_on_the_kl(posterior):
    mean, std = posterior
    mean, root = mean.clone().requires_grad_(), std.sqrt().requires_grad_()
    grad_mean, grad_root = torch.autograd.grad(
        kl_divergence(mean, root.square(), 0.2), (mean, root)
    )
    expected = mean.detach() - 1e-3 * grad_mean, root.detach() - 1e-3 * grad_root
    means, roots = [mean.detach().clone()], [root.detach().clone()]
    kl_step_(means, roots, step=1e-3, prior_std=0.2)
    torch.testing.assert_close((means[0], roots[0]), expected)


def test_kl_step_treats_layers_separately_and_takes_none():
    means, roots = (
        [torch.ones(1, 2), torch.zeros(2, 1)],
        [torch.full((1, 2), 0.3), torch.full((2, 1), 0.1)],
    )
    alone = [[m.clone()] for m in means], [[g.clone()] for g in roots]
    kl_step_(means, roots, 0.01, 0.5)
    for i in range(2):
        kl_step_(alone[0][i], alone[1][i], 0.01, 0.5)
        assert torch.equal(means[i], alone[0][i][0])
        assert torch.equal(roots[i], alone[1][i][0])
    kl_step_([], [], 0.01, 0.5)


def tanh_law(kl_time: float, prior_std: float, initial_std: float) -> float:
    return prior_std * math.tanh(4 * kl_time / prior_std + math.atanh(initial_std / prior_std))


@pytest.mark.parametrize("kl_time", [0.01, 0.05, 0.2])
def test_many_small_steps_follow_the_tanh_law(kl_time):
    steps = 20000
    roots = [torch.full((1, 1), 0.05, dtype=torch.float64)]
    means = [torch.ones(1, 1, dtype=torch.float64)]
    for _ in range(steps):
        kl_step_(means, roots, kl_time / steps, 0.2)
    assert roots[0].item() ** 2 == pytest.approx(tanh_law(kl_time, 0.2, 0.05**2), rel=2e-3)
    assert means[0].item() == pytest.approx(math.exp(-kl_time / 0.04), rel=1e-3)


def test_the_law_is_inverted():
    assert tanh_law(kl_time_to(0.13, 0.2, 0.002), 0.2, 0.002) == pytest.approx(0.13)


PUBLISHED = {640: 0.187, 1119: 0.174, 2251: 0.152, 2558: 0.148, 4957: 0.122, 9427: 0.098}


@pytest.mark.parametrize(("num_rows", "final_std"), PUBLISHED.items())
def test_the_published_settings_end_at_the_known_standard_deviations(num_rows, final_std):
    from bayestune.kl import burst_period, kl_weights, warmup_decay

    steps = 0.01 * kl_weights(5000, burst_period(num_rows, 4)) * warmup_decay(5000)
    assert std_after_steps(steps.tolist(), 0.2, 0.05) == pytest.approx(final_std, abs=6e-4)


def test_scalar_steps_are_the_tensor_steps():
    roots = [torch.linspace(0.05 / 2**0.5, 0.05, 2001, dtype=torch.float64)]
    means = [torch.zeros(2001, dtype=torch.float64)]
    steps = [1e-4 * (i % 7) for i in range(100)]
    for step in steps:
        kl_step_(means, roots, step, 0.2)
    assert std_after_steps(steps, 0.2, 0.05) == pytest.approx(
        roots[0].square().mean().item(), rel=1e-3
    )


@pytest.mark.parametrize("schedule", ["bursts", "constant"])
@pytest.mark.parametrize("total_steps", [40, 480])
def test_the_rate_solved_for_ends_where_asked(schedule, total_steps):
    from bayestune.kl import kl_weights, warmup_decay

    shape = (kl_weights(total_steps, 37, schedule) * warmup_decay(total_steps)).tolist()
    rate = rate_to(0.1, shape, 0.2, 0.05)
    assert std_after_steps([rate * s for s in shape], 0.2, 0.05) == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("final", [0.2, 0.3, 0.001, 0.0])
def test_a_std_that_the_kl_cannot_reach_is_refused(final):
    with pytest.raises(ValueError, match=f"got final_std={final}, expected .* < final_std < 0.2"):
        kl_time_to(final, 0.2, 0.001)


@pytest.mark.parametrize("draw", [row_weights, independent_weights])
def test_draws_have_the_posterior_as_their_marginal(draw, posterior):
    mean, std = posterior
    torch.manual_seed(0)
    samples = torch.cat([draw(mean, std, 4) for _ in range(20000)])
    error = std / math.sqrt(len(samples))
    # flipout's rows share |E|: mean over rows of one call are not independent in the second moment, hence the 4×
    assert ((samples.mean(0) - mean) / error).abs().max() < 4.5
    ratio = samples.var(0) / std.square()
    assert (ratio - 1).abs().max() < 4.5 * math.sqrt(2 * 4 / len(samples))


@pytest.mark.parametrize("draw", [row_weights, independent_weights])
def test_noises_of_two_rows_and_of_two_entries_are_uncorrelated(draw, posterior):
    mean, std = posterior
    torch.manual_seed(1)
    noise = torch.stack([(draw(mean, std, 2) - mean) / std for _ in range(20000)])
    between_rows = (noise[:, 0] * noise[:, 1]).mean(0)
    between_entries = (noise[:, 0, 0, 0] * noise[:, 0, 1, 1]).mean()
    assert between_rows.abs().max() < 4.5 * math.sqrt(
        3 / 20000
    )  # flipout multiplies one E by itself: E⁴ has mean 3
    assert between_entries.abs() < 4.5 * math.sqrt(1 / 20000)


def test_flipout_shares_the_size_of_the_noise_and_independent_does_not(posterior):
    mean, std = posterior
    flipout, independent = (
        row_weights(mean, std, 2) - mean,
        independent_weights(mean, std, 2) - mean,
    )
    torch.testing.assert_close(flipout[0].abs(), flipout[1].abs())
    assert not torch.allclose(independent[0].abs(), independent[1].abs())


def test_draws_pass_the_gradient_of_the_reparametrisation(posterior):
    mean, std = (p.clone().requires_grad_() for p in posterior)
    draws = row_weights(mean, std, 3)
    cotangent = torch.randn(3, 3, 5, dtype=torch.float64)
    grads = torch.autograd.grad(draws, (mean, std), cotangent)
    noise = (draws - mean).detach() / std.detach()
    torch.testing.assert_close(grads, (cotangent.sum(0), (cotangent * noise).sum(0)))


def test_held_noise_is_standard_normal():
    noise = held_noise((200, 500), seed=0, index=0, path="layer")
    count = noise.numel()
    assert noise.dtype == torch.float32
    assert abs(noise.mean()) < 4 / math.sqrt(count)
    assert abs(noise.var() - 1) < 4 * math.sqrt(2 / count)
    assert abs((noise**4).mean() - 3) < 4 * math.sqrt(96 / count)


def test_held_noise_depends_on_every_part_of_its_address_and_on_nothing_else():
    base = held_noise((4, 6), 0, 1, "a.b")
    torch.manual_seed(99)
    torch.randn(10)
    assert torch.equal(base, held_noise((4, 6), 0, 1, "a.b"))
    for other in (
        held_noise((4, 6), 1, 1, "a.b"),
        held_noise((4, 6), 0, 2, "a.b"),
        held_noise((4, 6), 0, 1, "a.c"),
    ):
        assert not torch.equal(base, other)
        assert abs((base * other).mean()) < 4 / math.sqrt(base.numel())


def test_held_noise_has_the_bits_it_had_in_the_first_release():
    values = held_noise((1, 3), seed=0, index=0, path="model.layers.0.self_attn.q_proj")
    assert [v.hex() for v in values.flatten().tolist()] == HELD_BITS


HELD_BITS = ["0x1.f987cc0000000p-1", "-0x1.720f000000000p-2", "0x1.a522280000000p-2"]


def test_held_weights_are_mean_plus_std_times_noise(posterior):
    mean, std = (p.float() for p in posterior)
    expected = mean + std * held_noise((3, 5), 2, 4, "x")
    assert torch.equal(held_weights(mean, std, 2, 4, "x"), expected)
    assert held_weights(mean.bfloat16(), std, 2, 4, "x").dtype == torch.float32
