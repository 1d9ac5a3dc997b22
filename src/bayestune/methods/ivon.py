"""IVON: a Newton-like optimiser that learns a diagonal Gaussian over what it trains."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from bayestune.adapters import SIDES, Slots, make_gaussian
from bayestune.errors import NUMERIC, Refusal, check_fields
from bayestune.posteriors import Gaussian
from bayestune.scoring import Scorer
from bayestune.training import Training, fit_adapter


class IVONOptimizer(torch.optim.Optimizer):
    """q(θ) = N(m, diag σ²), σ = 1/√(ess·(h + δ)): parameters are m between steps, draws within one.

    A step is `draw()`, forward and backward passes, `step()`. With g the gradient of the mean loss
    at θ = m + σ∘ε:

        ĥ = g∘ε/σ,  ḡ ← β₁ḡ + (1 − β₁)g,
        h ← β₂h + (1 − β₂)ĥ + ½(1 − β₂)²(h − ĥ)²/(h + δ),
        m ← m − lr·clip((ḡ/(1 − β₁ᵗ) + δm)/(h + δ)).

    All batches of a step, and all processes, share the draw: its noise comes from (seed, t) and not
    from torch's global generator, so that a resumed run ends bit by bit as the whole one.

    Args:
        params: parameters or groups of them.
        settings: rates and prior; its `ess` is a number.
        seed: of the noise.

    Reference:
        Shen et al.: Variational learning is effective for large deep networks, ICML 2024,
        https://arxiv.org/abs/2402.17641, algorithm 1.
    """

    def __init__(self, params: Iterable[Any], settings: "IVON", seed: int = 0) -> None:
        values = asdict(settings)
        values["lr"] = values.pop("learning_rate")
        values["betas"] = (values.pop("beta1"), values.pop("beta2"))
        super().__init__(params, {"steps": 0, "seed": seed, **values})
        self._pending: dict[Tensor, tuple[Tensor, Tensor]] = {}  # a drawn parameter's m and ε

    @torch.no_grad()
    def stds(self) -> dict[Tensor, Tensor]:
        """σ of each parameter."""
        return {p: self._std(p, group) for group in self.param_groups for p in group["params"]}

    def _std(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        return (group["ess"] * (self._hessian(parameter, group) + group["delta"])).rsqrt()

    def _hessian(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["hessian"] = torch.full_like(parameter, group["hess_init"], requires_grad=False)
            state["momentum"] = torch.zeros_like(parameter, requires_grad=False)
        return state["hessian"]

    @torch.no_grad()
    def draw(self) -> None:
        """Sets the parameters to a draw m + σ∘ε; an earlier draw that no step used is dropped."""
        self._put_means_back()
        generators: dict[torch.device, torch.Generator] = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.device not in generators:
                    generators[p.device] = _generator(p.device, group["seed"], group["steps"])
                generator = generators[p.device]
                noise = torch.randn(p.shape, generator=generator, device=p.device, dtype=p.dtype)
                self._pending[p] = p.detach().clone(), noise
                p.addcmul_(self._std(p, group), noise)

    def _put_means_back(self) -> dict[Tensor, Tensor]:
        """Sets the parameters to m again; returns the draw's noise ε by parameter."""
        for parameter, (mean, _) in self._pending.items():
            parameter.copy_(mean)
        noises = {parameter: noise for parameter, (_, noise) in self._pending.items()}
        self._pending = {}
        return noises

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Moves m, h and the momentum by the gradients at the draw; then the parameters are m."""
        if not self._pending:
            raise RuntimeError(
                "IVON steps from a draw: got no noise, expected draw() before the forward pass"
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
        beta1, beta2 = group["betas"]
        delta = group["delta"]
        h = self._hessian(mean, group)
        momentum = self.state[mean]["momentum"]
        # ĥ = g∘ε/σ, so the update of h is the change d = (1 − β₂)(ĥ − h) and d²/(2(h + δ))
        change = (gradient * noise * (group["ess"] * (h + delta)).sqrt() - h).mul_(1 - beta2)
        h.add_(change + change.square() / (2 * (h + delta)))
        momentum.lerp_(gradient, 1 - beta1)
        step = (momentum / (1 - beta1 ** group["steps"]) + delta * mean) / (h + delta)
        mean.sub_(step.clamp_(-group["clip_radius"], group["clip_radius"]), alpha=group["lr"])


def _generator(device: torch.device, seed: int, step: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{step}".encode()).digest()
    key = int.from_bytes(digest[:4], "little")  # the CPU's generator reads 32 bits only
    return torch.Generator(device).manual_seed(key)


class DrawBeforeStep(TrainerCallback):
    """Has the optimiser draw before the first forward pass of each step."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finds the optimiser, which accelerate wraps."""
        wrapper = kwargs["optimizer"]
        self.optimizer: IVONOptimizer = getattr(wrapper, "optimizer", wrapper)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draws."""
        self.optimizer.draw()


@dataclass(frozen=True)
class IVON:
    """Gaussians on both of LoRA's matrices, learnt by `IVONOptimizer` in place of AdamW.

    The defaults are the second reference's as far as known: its tables were not at hand and its
    code was not read. `Training`'s warm-up and decay apply, its learning rate and weight decay do
    not. A head that is trained whole is learnt likewise, and the posterior holds its mean.

    Args:
        learning_rate: at its peak.
        ess: the effective sample size; None for the number of training rows, exact Bayes, which
            needs a larger `hess_init`: noise starts at 1/√(ess·(hess_init + delta)).
        hess_init: h at the start.
        delta: δ; the prior is N(0, 1/(ess·δ)).
        beta1: of the momentum.
        beta2: of h.
        clip_radius: bound on each entry of the preconditioned gradient; infinity for none.

    Raises:
        Refusal: if a value is out of range.

    Reference:
        Shen et al., ICML 2024, https://arxiv.org/abs/2402.17641; for LoRA Cong et al.: Variational
        low-rank adaptation using IVON, 2024, https://arxiv.org/abs/2411.04421.
    """

    learning_rate: float = 0.03
    ess: float | None = 1e7
    hess_init: float = 3e-4
    delta: float = 1e-6
    beta1: float = 0.9
    beta2: float = 0.99999
    clip_radius: float = 1e-3

    def __post_init__(self) -> None:
        check_fields(self, learning_rate=NUMERIC, hess_init=NUMERIC, delta=NUMERIC)
        check_fields(self, beta1=NUMERIC, beta2=NUMERIC)
        if self.ess is not None:
            check_fields(self, ess=NUMERIC)
        ess = 1.0 if self.ess is None else self.ess
        prior = self.delta + self.hess_init
        positive = min(self.learning_rate, ess, prior) > 0 and self.clip_radius > 0  # may be inf
        betas = 0 <= self.beta1 < 1 and 0 <= self.beta2 < 1
        if not positive or not betas or min(self.delta, self.hess_init) < 0:
            raise Refusal(
                f"out of range: got {self}, expected learning_rate, ess, clip_radius > 0, delta, "
                "hess_init ≥ 0 and not both 0, beta1, beta2 in [0, 1); correct it"
            )

    def fit(self, model: nn.Module, scorer: Scorer, training: Training) -> Gaussian:
        """Trains an adapter and makes both its slots Gaussian."""
        settings = replace(self, ess=float(len(scorer.task.train))) if self.ess is None else self

        def optimizer(adapted: nn.Module) -> IVONOptimizer:
            trainable = [p for p in adapted.parameters() if p.requires_grad]
            return IVONOptimizer(trainable, settings, training.seed)

        draw = DrawBeforeStep()
        adapted, report = fit_adapter(model, scorer, training, [draw], optimizer=optimizer)
        stds = draw.optimizer.stds()
        slots = Slots(adapted)
        make_gaussian(slots, slots.names(SIDES))
        posterior = Gaussian(adapted, scorer, report=report)
        with torch.no_grad():
            for layer in posterior.layers().values():
                layer.root_std.copy_(stds[layer.weight].sqrt())
        return posterior
