"""The KL divergence of N(M, Ω²) from its prior, its gradient step, and how it moves Ω."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bayestune.errors import Refusal


def kl_divergence(mean: Tensor, std: Tensor, prior_std: float) -> Tensor:
    """KL divergence of a diagonal Gaussian from its zero-mean prior, a sum over all entries.

    KL[N(M, Ω²) ‖ N(0, σ_p²)] = Σ [ log(σ_p/Ω) + (Ω² + M²)/(2σ_p²) − ½ ].

    Args:
        mean: M, any shape.
        std: Ω > 0, the shape of `mean`.
        prior_std: σ_p > 0.

    Returns:
        The divergence in nats, shape ().

    Example:
        >>> kl_divergence(torch.zeros(2, 3), torch.full((2, 3), 0.2), prior_std=0.2).item()
        0.0

    Reference:
        Wang, Shi, Han, Metaxas, Wang: BLoB (equation 10), NeurIPS 2024,
        https://arxiv.org/abs/2406.11675.
    """
    moments = (std.square() + mean.square()) / (2 * prior_std**2)
    return (moments - std.log() + math.log(prior_std) - 0.5).sum()


def kl_step_(
    means: Sequence[Tensor], root_stds: Sequence[Tensor], step: float, prior_std: float
) -> None:
    """One gradient step η on the KL in nats, in place and fused over all layers.

    M ← M·(1 − η/σ_p²),  G ← G + η·(2/G − 2G³/σ_p²), M and G (r, k) of each layer, no entry of G 0.
    """
    means = list(means)
    root_stds = list(root_stds)
    precision = prior_std**-2
    with torch.no_grad():
        if means:
            torch._foreach_mul_(means, 1.0 - step * precision)
        if not root_stds:
            return
        cubed = torch._foreach_mul(root_stds, root_stds)
        torch._foreach_mul_(cubed, root_stds)
        inverse = torch._foreach_reciprocal(root_stds)
        torch._foreach_add_(root_stds, inverse, alpha=2 * step)
        torch._foreach_add_(root_stds, cubed, alpha=-2 * step * precision)


def kl_time_to(final_std: float, prior_std: float, initial_std: float = 0.0) -> float:
    """KL time τ, the sum of the steps η, after which the KL alone takes σ_0 to `final_std`.

    dσ/dτ = 4·(1 − σ²/σ_p²), so σ(τ) = σ_p·tanh(4τ/σ_p + artanh(σ_0/σ_p)): the tanh law.

    Raises:
        Refusal: unless σ_0 < σ < σ_p: the KL takes σ from σ_0 towards σ_p.

    Example:
        >>> round(kl_time_to(0.1, prior_std=0.2), 5)
        0.02747
    """
    if not 0 <= initial_std < final_std < prior_std:
        raise Refusal(
            "final_std must lie between the initial standard deviation and prior_std: got "
            f"final_std={final_std}, expected {initial_std:.4g} < final_std < {prior_std}; choose "
            "a smaller final_std or a larger prior_std"
        )
    return prior_std / 4 * (math.atanh(final_std / prior_std) - math.atanh(initial_std / prior_std))


def std_after_steps(steps: Sequence[float], prior_std: float, roots: Sequence[float]) -> float:
    """Mean σ = G² over some entries of G after KL steps η (T,), as `kl_step_` takes them.

    For small steps it follows the tanh law of `kl_time_to`.

    Args:
        steps: the sizes η; none for the mean σ now.
        prior_std: σ_p.
        roots: the entries of G at the start, see `start_roots` and `points_of`.
    """
    for step in steps:
        roots = _after_step(roots, step, prior_std)
    return sum(g * g for g in roots) / len(roots)


def _after_step(roots: Sequence[float], step: float, prior_std: float) -> list[float]:
    """Entries of G after one KL step η."""
    precision = prior_std**-2
    return [g + 2 * step * (1 / g - precision * g * g * g) for g in roots]


def refuse_long_steps(steps: Sequence[float], prior_std: float, roots: Sequence[float]) -> None:
    """Refuses KL steps η (T,) that overshoot: M would change its sign, or σ rise beyond σ_p.

    Under infinitely small steps neither happens: M only shrinks, and σ rises to σ_p from below.

    Args:
        steps: the sizes η.
        prior_std: σ_p.
        roots: entries of G at the start.

    Raises:
        Refusal: if a step is too long.
    """
    largest = max(1.5 * math.sqrt(prior_std), *roots)  # G tends to √σ_p; half of it is leeway
    for number, step in enumerate(steps, start=1):
        roots = _after_step(roots, step, prior_std)
        if step >= prior_std**2 or not all(0 < g <= largest for g in roots):
            raise Refusal(
                f"a step of the KL is too long: got {step:.3g} in step {number} of {len(steps)},"
                f" which overshoots the prior (prior_std={prior_std}); train for more steps, or "
                "set a smaller final_std or kl_lr"
            )


def start_roots(init_root_std: float) -> list[float]:
    """Four values that stand for all entries of G at its start, uniform on (ε/√2, ε)."""
    low = math.sqrt(0.5)
    return [init_root_std * (low + (1 - low) * (i + 0.5) / 4) for i in range(4)]


@torch.no_grad()
def points_of(root_stds: Sequence[Tensor], count: int = 8) -> list[float]:
    """A few values that stand for all entries of G of several layers, each of equal weight.

    They are quantiles, scaled so that the mean of their squares is the mean σ over the layers.

    Args:
        root_stds: G (r, k) of each layer.
        count: how many values.
    """
    quantiles = []
    mean_stds = []
    for root_std in root_stds:
        ordered = root_std.detach().double().abs().flatten().sort().values
        positions = (torch.arange(count, dtype=torch.float64) + 0.5) / count * len(ordered)
        quantiles.append(ordered[positions.long().to(ordered.device)].cpu())
        mean_stds.append(ordered.square().mean().item())
    ordered = torch.cat(quantiles).sort().values
    stds = ordered.view(count, -1).square().mean(1)
    stds *= sum(mean_stds) / len(mean_stds) / stds.mean()
    return stds.sqrt().tolist()


def rate_to(
    final_std: float, shape: Sequence[float], prior_std: float, roots: Sequence[float]
) -> float:
    """The learning rate λ with which the KL steps λ·shape (T,) end at `final_std`, by bisection.

    Args:
        final_std: the mean σ to end at.
        shape: the steps up to the factor λ, not all 0.
        prior_std: σ_p.
        roots: entries of G at the start.

    Raises:
        Refusal: if the KL cannot take the standard deviation there, see `kl_time_to`.
    """

    def falls_short(rate: float) -> bool:
        steps = [rate * size for size in shape]
        return std_after_steps(steps, prior_std, roots) < final_std

    kl_time = kl_time_to(final_std, prior_std, std_after_steps([], prior_std, roots))
    return bisected(falls_short, kl_time / sum(shape))


def bisected(falls_short: Callable[[float], bool], high: float) -> float:
    """The rate up to which `falls_short` is true, by 30 bisections.

    Args:
        falls_short: whether a rate is too small: true up to some rate, false beyond it.
        high: a first upper bound, such as the rate that infinitely small steps would need; it is
            raised as long as it falls short.
    """
    low = 0.0
    while falls_short(high):  # steps of finite size may lag behind the law of small ones
        high *= 1.5
    for _ in range(30):
        middle = (low + high) / 2
        if falls_short(middle):
            low = middle
        else:
            high = middle
    return (low + high) / 2
