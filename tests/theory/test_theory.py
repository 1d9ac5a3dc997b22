"""The paper's theorems and an exact case, numerically on small sizes."""

import torch
from torch import nn
from torch.testing import assert_close

from bayestune.adapters import GaussianLinear
from bayestune.kl import kl_divergence
from bayestune.kl.closed_form import kl_step_

OUT = 5
WIDTH = 3
RANK = 2
SCALE = 2.0
PRIOR = 0.2


def random(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


FROZEN = random(OUT, WIDTH, seed=0)
B = random(OUT, RANK, seed=1)
MEAN = random(RANK, WIDTH, seed=2)
STD = random(RANK, WIDTH, seed=3).abs() / 10 + 0.02
IDENTITY = torch.eye(WIDTH, dtype=torch.float64)


def vec(matrices: torch.Tensor) -> torch.Tensor:
    """Columns on top of one another: (…, d, k) to (…, k·d)."""
    return matrices.transpose(-1, -2).flatten(-2)


def covariance_of_weight() -> torch.Tensor:
    """Theorem 1: the covariance s²·[I_k ⊗ B]·diag(vec Ω)²·[I_k ⊗ Bᵀ] of vec W."""
    lift = torch.kron(IDENTITY, B)
    return SCALE**2 * lift @ vec(STD).square().diag() @ lift.T


def test_theorem_1_the_weight_is_gaussian_with_a_low_rank_covariance():
    count = 200_000
    draws = MEAN + STD * random(count, RANK, WIDTH, seed=4)
    weights = vec(FROZEN + SCALE * B @ draws)
    covariance = covariance_of_weight()
    variance = covariance.diag()
    shift = weights.mean(0) - vec(FROZEN + SCALE * B @ MEAN)
    assert (shift / (variance / count).sqrt()).abs().max() < 4.5
    error = ((variance[:, None] * variance + covariance.square()) / count).sqrt()
    assert ((weights.T.cov() - covariance) / error).abs().max() < 4.5
    assert torch.linalg.matrix_rank(covariance) == RANK * WIDTH


def test_theorem_2_the_kl_on_the_weight_is_the_kl_on_a():
    root = torch.linalg.svd(SCALE * B, full_matrices=False)
    factor = (root.U * root.S).contiguous()  # R with R·Rᵀ = s²·B·Bᵀ, another root than s·B itself
    lift = PRIOR * torch.kron(IDENTITY, factor)
    prior = lift @ lift.T
    basis = torch.linalg.svd(prior).U[:, : RANK * WIDTH]  # the support that both have
    q = basis.T @ covariance_of_weight() @ basis
    p = basis.T @ prior @ basis
    shift = basis.T @ vec(SCALE * B @ MEAN)
    inverse = torch.linalg.inv(p)
    quadratic = (inverse @ q).trace() + shift @ inverse @ shift - RANK * WIDTH
    kl = 0.5 * (quadratic + torch.logdet(p) - torch.logdet(q))
    assert_close(kl, kl_divergence(MEAN, STD, PRIOR))


def test_blob_on_conjugate_regression_finds_the_mean_field_optimum():
    """One output, B = 1, noise s²: with P = XᵀX/s² + I/σ_p², m = P⁻¹Xᵀy/s² and ω_j² = 1/P_jj."""
    torch.manual_seed(0)
    noise = 0.5
    prior = 0.7
    steps = 6000
    x = torch.randn(40, WIDTH)
    y = x @ torch.tensor([0.5, -1.0, 0.2]) + noise * torch.randn(40)
    slot = GaussianLinear(nn.Linear(WIDTH, 1, bias=False), init_root_std=0.3, noise="independent")
    optimizer = torch.optim.SGD(slot.parameters(), lr=1.0)
    kept = []
    for step in range(steps):
        rate = 2e-3 * (1 - step / steps) + 1e-5
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = ((slot(x[:, None])[:, 0, 0] - y).square() / (2 * noise**2)).sum()
        loss.backward()
        optimizer.step()
        kl_step_([slot.weight], [slot.root_std], rate, prior)
        if step > steps - 1500:
            kept.append(torch.cat([slot.weight, slot.std]).detach().clone())
    mean, std = torch.stack(kept).mean(0)
    precision = x.T @ x / noise**2 + torch.eye(WIDTH) / prior**2
    optimum = torch.linalg.solve(precision, x.T @ y / noise**2)
    assert_close(mean, optimum, atol=0.015, rtol=0)
    assert_close(std, precision.diagonal().rsqrt(), atol=0.006, rtol=0)
