"""Bayes by backprop: Gaussians on both of LoRA's matrices."""

from dataclasses import dataclass
from typing import ClassVar

from bayestune.lora import SIDES
from bayestune.methods.blob import BLoB


@dataclass(frozen=True)
class BBB(BLoB):
    """q(A, B) = N(M_A, Ω_A²) N(M_B, Ω_B²): BLoB's Gaussian, noise and KL step in both slots of each layer.

    The paper's argument for the asymmetric form is what this symmetric one shows: B starts at 0 with noise, so early
    gradients of A are noise too, and the product of two noises is no Gaussian.

    Reference:
        Blundell, Cornebise, Kavukcuoglu, Wierstra: Weight uncertainty in neural networks, ICML 2015,
        https://arxiv.org/abs/1505.05424; as a baseline in Wang et al., https://arxiv.org/abs/2406.11675, table 1.
    """

    sides: ClassVar[tuple[str, ...]] = SIDES
