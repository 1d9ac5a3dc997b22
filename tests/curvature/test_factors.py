"""Σ x·xᵀ over a stream of rows, whole or by its leading eigenpairs."""

import pytest
import torch

from bayestune.curvature.factors import FullSum, LowRankSum
from dense import close

LIKE = torch.zeros(0, dtype=torch.float64)


@pytest.mark.parametrize("rank", [30, 15])
def test_a_low_rank_sum_that_keeps_all_is_the_full_sum(rank):
    generator = torch.Generator().manual_seed(0)
    full, low = FullSum(30, LIKE), LowRankSum(30, rank, LIKE)
    span = torch.randn(rank, 30, generator=generator, dtype=torch.float64)
    for count in (3, 40, 7, 100):
        rows = torch.randn(count, rank, generator=generator, dtype=torch.float64) @ span
        full.add(rows)
        low.add(rows)
    vectors = low.eigen()[0]
    assert vectors.shape == (30, rank)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(rank, dtype=torch.float64))
    for eigenvectors, eigenvalues in (low.eigen(), full.eigen()):
        close(eigenvectors * eigenvalues @ eigenvectors.mT, full.total, 1e-9)


def test_a_low_rank_sum_keeps_the_leading_directions():
    generator = torch.Generator().manual_seed(0)
    scales = 10 * 0.8 ** torch.arange(200.0)
    turn = torch.linalg.qr(torch.randn(200, 200, generator=generator)).Q
    full, low = FullSum(200, turn), LowRankSum(200, 10, turn)
    for _ in range(30):
        rows = torch.randn(60, 200, generator=generator) * scales @ turn
        full.add(rows)
        low.add(rows)
    vectors, values = low.eigen()
    exact = torch.linalg.eigvalsh(full.total).flip(0)[:10]
    torch.testing.assert_close(values, exact, rtol=0.01, atol=0)
    assert ((full.total @ vectors - vectors * values).norm(dim=0) / values).max() < 0.1


@pytest.mark.parametrize("empty", [FullSum(4, LIKE), LowRankSum(40, 10, LIKE)])
def test_a_sum_of_no_rows_is_zero(empty):
    assert empty.eigen()[1].sum() == 0
