"""BLoB as published, for benchmarks alone: noise on activations token by token, two backward passes, full logits.

It is the reference point of our task step, in its straightforward form, and takes the same updates (tests hold it to
`GaussianLinear(noise="token")` with `KLStep`). The authors' own code is measured by `official.py`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

from bayestune.adapters import ADAPTER, adapted_layers
from bayestune.adapters.noise import random_signs
from bayestune.kl import kl_divergence, kl_weights, warmup_decay
from subjects import MANY_STEPS, Loss, Prompts, adamw, autocast


def add_noise(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """A LoRA layer's output with the noise path beside its mean path: + s·((x∘r)(Ω∘E)ᵀ∘q)Bᵀ.

    The signs r (N, T, k) and q (N, T, r) are drawn for every token, E ~ N(0, 1) once a pass.

    Args:
        layer: PEFT's layer with `root_std`; a forward hook's first argument.
        inputs: x (N, T, k).
        output: of the mean path (N, T, d).

    Reference:
        Wang, Shi, Han, Metaxas, Wang: BLoB, NeurIPS 2024, https://arxiv.org/abs/2406.11675, section 3.3.
    """
    root_std, scaling = layer.root_std, layer.scaling[ADAPTER]
    input = inputs[0].to(root_std.dtype)
    sign_in = random_signs(*input.shape, like=input)
    sign_out = random_signs(*input.shape[:-1], root_std.shape[0], like=input)
    noise = F.linear(input * sign_in, root_std.square() * torch.randn_like(root_std)) * sign_out
    return output + (F.linear(noise, layer.lora_B[ADAPTER].weight) * scaling).to(output.dtype)


def publish(model: nn.Module, init_root_std: float = 0.05) -> list[LoraLayer]:
    """Makes the A of every LoRA layer of a stock PEFT model Gaussian in the published form; gives the layers.

    Args:
        model: a PEFT model, changed in place: each LoRA layer gets `root_std` and a forward hook.
        init_root_std: ε; G starts uniform on (ε/√2, ε).
    """
    layers = list(adapted_layers(model).values())
    for layer in layers:
        start = torch.empty_like(layer.lora_A[ADAPTER].weight).uniform_(
            init_root_std / math.sqrt(2), init_root_std
        )
        layer.root_std = nn.Parameter(start)
        layer.register_forward_hook(add_noise)
    return layers


def divergence(layers: Iterable[Any], prior_std: float) -> Tensor:
    """The KL in float64, summed over the layers, each with a graph of its own."""
    pairs = ((layer.lora_A[ADAPTER].weight, layer.root_std) for layer in layers)
    return sum(
        (kl_divergence(mean.double(), root.square().double(), prior_std) for mean, root in pairs),
        torch.zeros(()),
    )


@dataclass
class PublishedStep:
    """Likelihood's backward pass and AdamW's step; the KL's backward pass and SGD's step, with G's of the likelihood.

    Args:
        model: of `publish`.
        layers: its noisy layers.
        loss: of the likelihood.
        precision: see `autocast`.
        likelihood: AdamW on A's mean and B.
        kl: SGD on all that is trained; B has no gradient of the KL.
        weights: π_t.
        rates: the KL's learning rate at each step.
        prior_std: σ_p.
    """

    model: nn.Module
    layers: list[LoraLayer]
    loss: Loss
    precision: str
    likelihood: torch.optim.Optimizer
    kl: torch.optim.Optimizer
    weights: Tensor
    rates: Tensor
    prior_std: float
    step: int = 0

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def __call__(self, turn: int) -> None:
        """Takes the step of one turn."""
        with autocast(self.device, self.precision):
            loss = self.loss(self.model, turn)
        loss.backward()
        self.likelihood.step()
        self.likelihood.zero_grad(set_to_none=True)
        (divergence(self.layers, self.prior_std) * float(self.weights[self.step])).backward()
        self.kl.param_groups[0]["lr"] = float(self.rates[self.step])
        self.kl.step()
        self.kl.zero_grad(set_to_none=True)
        self.step += 1


def published_step(
    model: nn.Module,
    layers: list[LoraLayer],
    loss: Loss,
    precision: str,
    *,
    kl_lr: float = 0.01,
    period: int = 100,
    total_steps: int = MANY_STEPS,
    prior_std: float = 0.2,
) -> PublishedStep:
    """The published step with the settings of `training_step`; AdamW is fused here too, as the authors' is not.

    Args:
        model: of `publish`.
        layers: what `publish` gave.
        loss: of the likelihood.
        precision: see `autocast`.
        kl_lr: the KL's learning rate at its peak.
        period: of its bursts.
        total_steps: of the run that is planned.
        prior_std: σ_p.
    """
    stds = {id(layer.root_std) for layer in layers}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    others = [parameter for parameter in trained if id(parameter) not in stds]
    likelihood = adamw(others)
    weights, rates = kl_weights(total_steps, period), kl_lr * warmup_decay(total_steps)
    sgd = torch.optim.SGD(trained, lr=kl_lr)
    return PublishedStep(model, layers, loss, precision, likelihood, sgd, weights, rates, prior_std)


def answer_loss(prompts: Prompts) -> Loss:
    """What the authors compute: logits at all positions, of which the answers' tokens at the last one are used."""
    tokens = torch.tensor(prompts.scorer.tokens)

    def loss(model: nn.Module, turn: int) -> Tensor:
        batch = prompts.batches[turn % len(prompts.batches)]
        names = ("input_ids", "attention_mask", "position_ids")
        logits = model(**{name: batch[name] for name in names}, use_cache=False).logits
        mask = batch["option_mask"]
        chosen = logits[:, -1, tokens[: mask.shape[1]].to(logits.device)].float()
        return F.cross_entropy(chosen.masked_fill(~mask, -torch.inf), batch["labels"])

    return loss
