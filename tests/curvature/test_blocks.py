"""The root of semidefinite matrices; blocks themselves are held to dense algebra in test_ggn."""

import torch

from bayestune.curvature import semidefinite_root


def test_the_semidefinite_root_is_choleskys_and_takes_singular_matrices():
    matrices = torch.randn(6, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrices = matrices @ matrices.mT
    torch.testing.assert_close(semidefinite_root(matrices), torch.linalg.cholesky(matrices))
    singular = matrices[..., :2] @ matrices[..., :2].mT
    singular[:, 3] = singular[:, :, 3] = 0
    root = semidefinite_root(singular)
    torch.testing.assert_close(root @ root.mT, singular, atol=1e-7, rtol=1e-7)
    assert (root[:, 3] == 0).all()
