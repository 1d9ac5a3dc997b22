"""IVON: variational learning with a Newton-like optimiser that keeps a diagonal Gaussian over what it trains."""

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from bayestune.adapters import SIDES, Slots, bayesify
from bayestune.posteriors import Gaussian
from bayestune.scoring import Scorer
from bayestune.training import Training, start_adapter, train


class IVONOptimizer(torch.optim.Optimizer):
    """q(θ) = N(m, diag σ²), σ = 1/√(ess·(h + δ)): a parameter is m between steps and a draw of q within one.

    A step is `draw()`, forward and backward passes, `step()`. With g the gradient of the mean loss at θ = m + σ∘ε:
    ĥ = g∘ε/σ,  ḡ ← β₁ḡ + (1 − β₁)g,  h ← β₂h + (1 − β₂)ĥ + ½(1 − β₂)²(h − ĥ)²/(h + δ),
    m ← m − lr·clip((ḡ/(1 − β₁ᵗ) + δm)/(h + δ)). All batches of a step, and all processes, share the draw: its noise
    comes from (seed, t) and not from torch's global generator, and what is checkpointed resumes bit by bit.

    Args:
        params: parameters or groups of them.
        lr: the learning rate.
        ess: the effective sample size, by which the mean loss is multiplied.
        hess_init: h at the start.
        delta: δ; the prior is N(0, 1/(ess·δ)).
        betas: β₁, β₂.
        clip_radius: each entry of the preconditioned gradient is clipped to ±this; infinity for no clipping.
        seed: of the noise.

    Raises:
        ValueError: if a value is out of range.

    Reference:
        Shen et al.: Variational learning is effective for large deep networks, ICML 2024,
        https://arxiv.org/abs/2402.17641, algorithm 1.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        ess: float,
        hess_init: float,
        delta: float,
        betas: tuple[float, float] = (0.9, 0.99999),
        clip_radius: float = math.inf,
        seed: int = 0,
    ) -> None:
        wrong = {
            n: v for n, v in (("lr", lr), ("ess", ess), ("clip_radius", clip_radius)) if v <= 0
        }
        wrong |= {
            n: v
            for n, v in (("delta", delta), ("hess_init", hess_init))
            if v < 0 or delta + hess_init == 0
        }
        wrong |= {} if all(0 <= beta < 1 for beta in betas) else {"betas": betas}
        if wrong:
            raise ValueError(
                f"out of range: got {wrong}, expected lr, ess, clip_radius > 0, delta, hess_init ≥ 0 and not both 0, "
                "betas in [0, 1); correct it"
            )
        names = {
            "ess": ess,
            "hess_init": hess_init,
            "delta": delta,
            "betas": betas,
            "clip_radius": clip_radius,
        }
        super().__init__(params, {"lr": lr, "steps": 0, "seed": seed, **names})
        self._pending: dict[
            Tensor, tuple[Tensor, Tensor]
        ] = {}  # parameter: its m and ε while it is a draw

    @torch.no_grad()
    def std(self, parameter: Tensor) -> Tensor:
        """σ of one parameter."""
        group = next(g for g in self.param_groups if any(p is parameter for p in g["params"]))
        return (group["ess"] * (self._hessian(parameter, group) + group["delta"])).rsqrt()

    def _hessian(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["hessian"] = torch.full_like(parameter, group["hess_init"], requires_grad=False)
            state["momentum"] = torch.zeros_like(parameter, requires_grad=False)
        return state["hessian"]

    @torch.no_grad()
    def draw(self) -> None:
        """Puts a draw m + σ∘ε in the parameters; the one before, if it was not used by a step, is dropped."""
        self._put_means_back()
        generators: dict[torch.device, torch.Generator] = {}
        for group in self.param_groups:
            for p in group["params"]:
                generator = generators.setdefault(
                    p.device, _generator(p.device, group["seed"], group["steps"])
                )
                noise = torch.randn(p.shape, generator=generator, device=p.device, dtype=p.dtype)
                self._pending[p] = p.detach().clone(), noise
                p.addcmul_(
                    (group["ess"] * (self._hessian(p, group) + group["delta"])).rsqrt(), noise
                )

    def _put_means_back(self) -> dict[Tensor, Tensor]:
        noises = {parameter: noise for parameter, (_, noise) in self._pending.items()}
        for parameter, (mean, _) in self._pending.items():
            parameter.copy_(mean)
        self._pending = {}
        return noises

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Moves m, h and the momentum by the gradients at the draw; afterwards the parameters are m.

        Raises:
            RuntimeError: if there was no draw.
        """
        if not self._pending:
            raise RuntimeError(
                "a step of IVON without a draw: got no noise, expected draw() before the forward pass"
            )
        with torch.enable_grad():
            loss = closure() if closure else None
        noises = self._put_means_back()
        for group in self.param_groups:
            group["steps"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, noises[p], group)
        return loss

    def _update(self, mean: Tensor, gradient: Tensor, noise: Tensor, group: dict[str, Any]) -> None:
        h, momentum, delta = (
            self._hessian(mean, group),
            self.state[mean]["momentum"],
            group["delta"],
        )
        beta1, beta2 = group["betas"]
        change = (gradient * noise * (group["ess"] * (h + delta)).sqrt() - h).mul_(1 - beta2)
        h.add_(change + change.square() / (2 * (h + delta)))
        momentum.lerp_(gradient, 1 - beta1)
        step = (momentum / (1 - beta1 ** group["steps"]) + delta * mean) / (h + delta)
        mean.sub_(step.clamp_(-group["clip_radius"], group["clip_radius"]), alpha=group["lr"])


def _generator(device: torch.device, seed: int, step: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{step}".encode()).digest()
    return torch.Generator(device).manual_seed(
        int.from_bytes(digest[:4], "little")
    )  # the CPU's reads 32 bits only


class _Draw(TrainerCallback):
    """Draws before the first forward pass of each step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        getattr(optimizer, "optimizer", optimizer).draw()  # accelerate wraps the torch optimiser


@dataclass(frozen=True)
class IVON:
    """Gaussians on both of LoRA's matrices, learnt by `IVONOptimizer` in place of AdamW.

    The values for LoRA are those of the second reference as far as they are known to us: neither paper's tables were
    at hand when this was written, and their code was not read. `Training.learning_rate`, which is AdamW's, and
    `Training.weight_decay` are not used; warm-up and decay are. A head that is trained whole is learnt likewise, and
    the posterior holds its mean.

    Args:
        learning_rate: at its peak.
        ess: the effective sample size; None for the number of training rows, the exact Bayesian choice, which needs a
            larger `hess_init`: noise starts at 1/√(ess·(hess_init + delta)).
        hess_init: h at the start.
        delta: δ; the prior is N(0, 1/(ess·δ)).
        beta1: of the momentum.
        beta2: of h.
        clip_radius: bound on each entry of the preconditioned gradient.

    Reference:
        Shen et al., ICML 2024, https://arxiv.org/abs/2402.17641; for LoRA Cong et al.: Variational low-rank
        adaptation using IVON, 2024, https://arxiv.org/abs/2411.04421.
    """

    learning_rate: float = 0.03
    ess: float | None = 1e7
    hess_init: float = 3e-4
    delta: float = 1e-6
    beta1: float = 0.9
    beta2: float = 0.99999
    clip_radius: float = 1e-3

    def fit(self, model: nn.Module, scorer: Scorer, training: Training) -> Gaussian:
        """Trains a fresh adapter on `model` and makes both its slots Gaussian.

        Args:
            model: a transformers model without adapters.
            scorer: the task, bound to the model's tokenizer.
            training: the adapter and how it is trained.
        """
        adapted, made = start_adapter(model, training), []

        def optimizer(parameters: list[nn.Parameter]) -> IVONOptimizer:
            ess = float(len(scorer.task.train)) if self.ess is None else self.ess
            values = (
                ess,
                self.hess_init,
                self.delta,
                (self.beta1, self.beta2),
                self.clip_radius,
                training.seed,
            )
            made.append(IVONOptimizer(parameters, self.learning_rate, *values))
            return made[0]

        report = train(adapted, scorer, training, [_Draw()], optimizer=optimizer)
        slots = Slots(adapted)
        stds = {
            name: made[0].std(slot.get_parameter("weight"))
            for name, slot in slots.modules().items()
        }
        bayesify(adapted, slots=slots.names(SIDES))
        posterior = Gaussian(adapted, scorer, report=report)
        with torch.no_grad():
            for name, layer in posterior.layers().items():
                layer.root_std.copy_(stds[name].sqrt())
        return posterior
