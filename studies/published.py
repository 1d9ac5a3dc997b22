"""BLoB as published: noise on activations token by token, two backward passes, full logits.

It is the reference point of our task step, in its straightforward form, and takes the same updates
(a test holds it to `GaussianLinear(noise="token")` with `KLStep`). `official.py` drives the
authors' own code.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

from bayestune.adapters import ADAPTER, Slots
from bayestune.adapters.noise import random_signs
from bayestune.kl import kl_divergence, kl_weights, warmup_decay
from subjects import MANY_STEPS, Loss, Prompts, TrainingStep, adamw
from task_step import INPUTS


def add_noise(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """A LoRA layer's output with the noise path beside its mean path: + s·((x∘r)(Ω∘E)ᵀ∘q)Bᵀ.

    The signs r (N, T, k) and q (N, T, r) are drawn for every token, E ~ N(0, 1) once a pass.

    Args:
        layer: PEFT's layer with `root_std`; a forward hook's first argument.
        inputs: x (N, T, k).
        output: of the mean path (N, T, d).

    Reference:
        Wang, Shi, Han, Metaxas, Wang: BLoB, NeurIPS 2024, https://arxiv.org/abs/2406.11675,
        section 3.3.
    """
    root_std = layer.root_std
    input = inputs[0].to(root_std.dtype)
    sign_in = random_signs(*input.shape, like=input)
    sign_out = random_signs(*input.shape[:-1], root_std.shape[0], like=input)
    weight = root_std.square() * torch.randn_like(root_std)
    noise = F.linear(input * sign_in, weight) * sign_out
    drawn = F.linear(noise, layer.lora_B[ADAPTER].weight) * layer.scaling[ADAPTER]
    return output + drawn.to(output.dtype)


def publish(model: nn.Module, init_root_std: float = 0.05) -> list[LoraLayer]:
    """Makes the A of every LoRA layer of a stock PEFT model Gaussian in the published form.

    Args:
        model: a PEFT model, changed in place: each LoRA layer gets `root_std` and a forward hook.
        init_root_std: ε; G starts uniform on (ε/√2, ε).

    Returns:
        The layers.
    """
    layers = list(Slots(model).layers.values())
    for layer in layers:
        start = torch.empty_like(layer.lora_A[ADAPTER].weight)
        layer.root_std = nn.Parameter(start.uniform_(init_root_std / math.sqrt(2), init_root_std))
        layer.register_forward_hook(add_noise)
    return layers


def divergence(layers: Iterable[Any], prior_std: float) -> Tensor:
    """The KL in float64, summed over the layers, each with a graph of its own."""
    total = torch.zeros(())
    for layer in layers:
        mean = layer.lora_A[ADAPTER].weight.double()
        total = total + kl_divergence(mean, layer.root_std.square().double(), prior_std)
    return total


@dataclass(frozen=True)
class Plan:
    """The settings of `training_step`: the KL's peak learning rate, bursts, steps and prior."""

    kl_lr: float = 0.01
    period: int = 100
    total_steps: int = MANY_STEPS
    prior_std: float = 0.2


class PublishedStep:
    """The likelihood's backward pass and AdamW's step, then the KL's backward pass and SGD's step.

    AdamW is fused here too, which the authors' is not. SGD also takes G along the likelihood.

    Args:
        model: a model that `publish` has changed.
        layers: its noisy layers.
        loss: of the likelihood.
        precision: see `autocast`.
        plan: of the KL's steps.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: list[LoraLayer],
        loss: Loss,
        precision: str,
        plan: Plan = Plan(),
    ) -> None:
        self.model = model
        self.layers = layers
        self.plan = plan
        self.step = 0
        stds = {id(layer.root_std) for layer in layers}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = adamw([one for one in trained if id(one) not in stds])
        self.likelihood = TrainingStep(model, optimizer, loss, trained[0].device, precision)
        self.kl = torch.optim.SGD(trained, lr=plan.kl_lr)
        self.weights = kl_weights(plan.total_steps, plan.period)
        self.rates = plan.kl_lr * warmup_decay(plan.total_steps)

    def __call__(self, turn: int) -> None:
        """Takes the step of one turn."""
        self.likelihood(turn)  # leaves the gradients of G
        weight = float(self.weights[self.step])
        (divergence(self.layers, self.plan.prior_std) * weight).backward()
        self.kl.param_groups[0]["lr"] = float(self.rates[self.step])
        self.kl.step()
        self.kl.zero_grad(set_to_none=True)
        self.step += 1


def answer_loss(prompts: Prompts) -> Loss:
    """The authors' loss: logits at all positions, of which the last one's answer tokens count."""
    tokens = torch.tensor(prompts.scorer.tokens)  # type: ignore[union-attr]

    def loss(model: nn.Module, turn: int) -> Tensor:
        batch = prompts.batch(turn)
        logits = model(**{name: batch[name] for name in INPUTS}, use_cache=False).logits
        mask = batch["option_mask"]
        chosen = logits[:, -1, tokens[: mask.shape[1]].to(logits.device)].float()
        return F.cross_entropy(chosen.masked_fill(~mask, -torch.inf), batch["labels"])

    return loss
