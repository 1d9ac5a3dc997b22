"""The KL against torch.distributions and autograd; how its steps move the standard deviation."""

import math

import pytest
import torch
from torch.distributions import Normal
from torch.distributions import kl_divergence as reference
from torch.testing import assert_close

from bayestune.kl import burst_period, kl_divergence, kl_weights, warmup_decay
from bayestune.kl.closed_form import (
    kl_step_,
    kl_time_to,
    rate_to,
    start_roots,
    std_after_steps,
)

PUBLISHED = {640: 0.187, 1119: 0.174, 2251: 0.152, 2558: 0.148, 4957: 0.122, 9427: 0.098}


@pytest.fixture
def layers() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """M and G of two layers of different shapes."""
    torch.manual_seed(3)
    shapes = [(3, 5), (2, 1)]
    means = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    return means, [torch.rand(shape, dtype=torch.float64) * 0.4 + 0.2 for shape in shapes]


def test_the_kl_is_the_sum_of_univariate_divergences(layers):
    for mean, root in zip(*layers, strict=True):
        expected = reference(Normal(mean, root.square()), Normal(torch.zeros_like(mean), 0.2))
        assert_close(kl_divergence(mean, root.square(), 0.2), expected.sum())


def test_a_kl_step_is_a_gradient_step_on_the_kl_of_all_layers(layers):
    means, roots = layers
    leaves = [value.clone().requires_grad_() for value in (*means, *roots)]
    kl = kl_divergence(leaves[0], leaves[2].square(), 0.2)
    kl = kl + kl_divergence(leaves[1], leaves[3].square(), 0.2)
    gradients = torch.autograd.grad(kl, leaves)
    kl_step_(means, roots, step=1e-3, prior_std=0.2)
    for after, before, gradient in zip([*means, *roots], leaves, gradients, strict=True):
        assert_close(after, before.detach() - 1e-3 * gradient)
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


@pytest.mark.parametrize(("num_rows", "final_std"), PUBLISHED.items())
def test_the_published_settings_end_at_the_known_standard_deviations(num_rows, final_std):
    steps = 0.01 * kl_weights(5000, burst_period(num_rows, 4)) * warmup_decay(5000)
    assert std_after_steps(steps.tolist(), 0.2, start_roots(0.05)) == pytest.approx(
        final_std, abs=6e-4
    )


def test_steps_on_four_points_are_those_on_all_of_g():
    roots = [torch.linspace(0.05 / 2**0.5, 0.05, 2001, dtype=torch.float64)]
    steps = [1e-4 * (i % 7) for i in range(100)]
    for step in steps:
        kl_step_([torch.zeros_like(roots[0])], roots, step, 0.2)
    expected = roots[0].square().mean().item()
    assert std_after_steps(steps, 0.2, start_roots(0.05)) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("schedule", ["bursts", "constant"])
@pytest.mark.parametrize("total_steps", [40, 480])
def test_the_rate_that_is_solved_for_ends_where_asked(schedule, total_steps):
    shape = kl_weights(total_steps, 37, schedule) * warmup_decay(total_steps)
    rate = rate_to(0.1, shape.tolist(), 0.2, start_roots(0.05))
    assert std_after_steps((rate * shape).tolist(), 0.2, start_roots(0.05)) == pytest.approx(
        0.1, rel=1e-5
    )


@pytest.mark.parametrize("final", [0.2, 0.3, 0.001, 0.0])
def test_a_std_that_the_kl_cannot_reach_is_refused(final):
    with pytest.raises(ValueError, match=f"got final_std={final}, expected .* < final_std < 0.2"):
        kl_time_to(final, 0.2, 0.001)
