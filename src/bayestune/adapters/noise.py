"""Noise on weights: random signs, one draw for each row, and noise with an address."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor


def random_signs(*shape: int, like: Tensor) -> Tensor:
    """Independent fair signs ±1 from torch's global generator, in `like`'s type and device."""
    bits = torch.randint(0, 2, shape, dtype=like.dtype, device=like.device)
    return torch.rsub(bits, 1, alpha=2)  # 1 - 2 bits, in one kernel


def independent_noise(num_rows: int, like: Tensor) -> Tensor:
    """E ~ N(0, 1) of each row's own, (N, r, k), for a layer with the weight `like` (r, k)."""
    return torch.randn(num_rows, *like.shape, dtype=like.dtype, device=like.device)


class FlipoutNoise(NamedTuple):
    """E ~ N(0, 1) that the rows share, and signs s_n ∈ {±1}^r and t_n ∈ {±1}^k of each row."""

    noise: Tensor  # (r, k)
    sign_out: Tensor  # (N, r)
    sign_in: Tensor  # (N, k)

    @classmethod
    def drawn(cls, num_rows: int, rank: int, like: Tensor) -> Self:
        """From torch's global generator, for a layer of this rank with the weight `like` (…, k)."""
        width = like.shape[-1]
        signs = random_signs(num_rows, rank + width, like=like)
        noise = torch.randn(rank, width, dtype=like.dtype, device=like.device)
        return cls(noise, signs[:, :rank], signs[:, rank:])

    def of_ranks(self, ranks: slice) -> Self:
        """The noise of some of the ranks."""
        return self._replace(noise=self.noise[ranks], sign_out=self.sign_out[:, ranks])

    def of_rows(self, which: Tensor | slice) -> Self:
        """The noise of some of the rows, in any order."""
        return self._replace(sign_out=self.sign_out[which], sign_in=self.sign_in[which])


def held_noise(shape: Sequence[int], seed: int, index: int, path: str) -> Tensor:
    """Standard normal noise with an address: the same bits for the same (seed, index, path).

    A counter-based generator (Philox) is keyed by a hash of the address, so a draw depends neither
    on the other draws nor on the order of the layers, the batch, the device or the process.

    Args:
        shape: of the noise, such as (r, k).
        seed: of the set of draws.
        index: which draw, from 0.
        path: the layer's path in the model.

    Returns:
        E, float32, on the CPU.

    Example:
        >>> torch.equal(held_noise((2, 3), 0, 7, "layer"), held_noise((2, 3), 0, 7, "layer"))
        True
    """
    digest = hashlib.sha256(f"{seed}/{index}/{path}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    return torch.from_numpy(generator.standard_normal(tuple(shape), dtype=np.float32))


def held_weights(mean: Tensor, std: Tensor, seed: int, index: int, path: str) -> Tensor:
    """The held draw M + Ω∘E (r, k), float32 on the CPU: no bit of it depends on the device.

    E is the `held_noise` of the address (seed, index, path).
    """
    noise = held_noise(mean.shape, seed, index, path)
    return mean.detach().float().cpu() + std.detach().float().cpu() * noise
