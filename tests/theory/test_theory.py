"""The paper's theorems and exact cases, numerically on small sizes."""

import math

import pytest
import torch
from torch import nn

from bayestune.adapters import GaussianLinear
from bayestune.kl import kl_divergence
from bayestune.kl.closed_form import kl_step_

OUT, WIDTH, RANK, SCALE, PRIOR = 5, 3, 2, 2.0, 0.2


def layer(seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return draw(OUT, WIDTH), draw(OUT, RANK), draw(RANK, WIDTH), draw(RANK, WIDTH).abs() / 10 + 0.02


def vec(matrices):
    """Columns on top of one another: (…, d, k) to (…, k·d)."""
    return matrices.transpose(-1, -2).flatten(-2)


def q_of_weight(b, std):
    """Theorem 1: the covariance s²·[I_k ⊗ B]·diag(vec Ω)²·[I_k ⊗ Bᵀ] of vec W."""
    lift = torch.kron(torch.eye(WIDTH, dtype=torch.float64), b)
    return SCALE**2 * lift @ vec(std).square().diag() @ lift.T


def test_theorem_1_the_weight_is_gaussian_with_a_low_rank_covariance():
    frozen, b, mean, std = layer()
    generator = torch.Generator().manual_seed(1)
    count = 200_000
    draws = mean + std * torch.randn(count, RANK, WIDTH, generator=generator, dtype=torch.float64)
    weights = vec(frozen + SCALE * b @ draws)
    expected = q_of_weight(b, std)
    variance = expected.diag()
    centre_error = (weights.mean(0) - vec(frozen + SCALE * b @ mean)) / (variance / count).sqrt()
    assert centre_error.abs().max() < 4.5
    spread = (
        variance[:, None] * variance + expected.square()
    ) / count  # variance of a sample covariance
    assert ((weights.T.cov() - expected) / spread.sqrt()).abs().max() < 4.5
    assert torch.linalg.matrix_rank(expected) == RANK * WIDTH


def test_theorem_2_the_kl_on_the_weight_is_the_kl_on_a():
    _, b, mean, std = layer()
    q = q_of_weight(b, std)
    root = torch.linalg.svd(SCALE * b, full_matrices=False)
    factor = (root.U * root.S).contiguous()  # R with R·Rᵀ = s²·B·Bᵀ, another root than s·B itself
    lift = PRIOR * torch.kron(torch.eye(WIDTH, dtype=torch.float64), factor)
    p = lift @ lift.T
    basis = torch.linalg.svd(p).U[:, : RANK * WIDTH]  # the support that both have
    q_on, p_on = basis.T @ q @ basis, basis.T @ p @ basis
    shift = basis.T @ vec(SCALE * b @ mean)
    inverse = torch.linalg.inv(p_on)
    kl = 0.5 * (
        (inverse @ q_on).trace()
        + shift @ inverse @ shift
        - RANK * WIDTH
        + torch.logdet(p_on)
        - torch.logdet(q_on)
    )
    torch.testing.assert_close(kl, kl_divergence(mean, std, PRIOR))


def test_blob_on_conjugate_regression_finds_the_mean_field_optimum():
    """One output, B = 1, noise s²: with P = XᵀX/s² + I/σ_p², m = P⁻¹Xᵀy/s² and ω_j² = 1/P_jj."""
    torch.manual_seed(0)
    rows, width, noise, prior = 40, 3, 0.5, 0.7
    x = torch.randn(rows, width)
    y = x @ torch.tensor([0.5, -1.0, 0.2]) + noise * torch.randn(rows)
    slot = GaussianLinear(nn.Linear(width, 1, bias=False), init_root_std=0.3, noise="independent")
    optimizer = torch.optim.SGD(slot.parameters(), lr=1.0)
    kept, steps = [], 6000
    for step in range(steps):
        rate = 2e-3 * (1 - step / steps) + 1e-5
        optimizer.zero_grad()
        loss = ((slot(x[:, None])[:, 0, 0] - y).square() / (2 * noise**2)).sum()
        loss.backward()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        kl_step_([slot.weight], [slot.root_std], rate, prior)
        if step > steps - 1500:
            kept.append((slot.weight.detach().clone(), slot.std.detach().clone()))
    mean, std = (torch.stack(parts).mean(0)[0] for parts in zip(*kept, strict=True))
    precision = x.T @ x / noise**2 + torch.eye(width) / prior**2
    torch.testing.assert_close(
        mean, torch.linalg.solve(precision, x.T @ y / noise**2), atol=0.015, rtol=0
    )
    torch.testing.assert_close(std, precision.diagonal().rsqrt(), atol=0.006, rtol=0)
    assert math.isfinite(kl_divergence(mean, std, prior).item())


@pytest.mark.parametrize("seed", range(3))
def test_the_kl_of_a_diagonal_gaussian_is_torchs(seed):
    _, _, mean, std = layer(seed)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(
        normal(mean, std), normal(torch.zeros_like(mean), PRIOR)
    ).sum()
    torch.testing.assert_close(kl_divergence(mean, std, PRIOR), expected)
