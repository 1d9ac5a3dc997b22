"""Curvature by dense algebra: Jacobians by autograd, and blocks as matrices."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from bayestune.adapters import Slots
from bayestune.curvature import Diagonal


def adapted(model, targets, rank=2):
    """A PEFT model whose B is not 0."""
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model.eval()


class Linear(nn.Module):
    """f(x) = W·x."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 3, bias=False)

    def forward(self, x):
        return self.head(x)


def adapted_linear():
    torch.manual_seed(0)
    return adapted(Linear().double(), ["head"])


def score(model, batch):
    return model(batch["x"])


def jacobians(model, scorer, batch):
    """Logits, and J (N, C, out, in) by slot name, from a backward pass for each logit."""
    slots = Slots(model).modules()
    weights = [slot.weight for slot in slots.values()]
    logits = scorer(model.eval(), batch)
    found = [torch.zeros(*logits.shape, *weight.shape).to(weight) for weight in weights]
    for place in logits.isfinite().nonzero().tolist():
        gradients = torch.autograd.grad(logits[tuple(place)], weights, retain_graph=True)
        for jacobian, gradient in zip(found, gradients, strict=True):
            jacobian[tuple(place)] = gradient
    return logits.detach(), dict(zip(slots, found, strict=True))


def hessian(logits):
    """diag(p) − p·pᵀ (N, C, C)."""
    p = logits.double().softmax(-1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None]


def ggn(logits, jacobian):
    """H (P, P) of one matrix, flattened row by row."""
    flat = jacobian.flatten(2).double()
    return torch.einsum("ncp,ncd,ndq->pq", flat, hessian(logits), flat)


def dense(block):
    """H (P, P) of a block."""
    if isinstance(block, Diagonal):
        return torch.diag(block.values.flatten())
    outer = block.out_vectors * block.out_values @ block.out_vectors.mT
    return torch.kron(outer, block.in_vectors * block.in_values @ block.in_vectors.mT)


def inverse(block, precision):
    """(H + λI)⁻¹ (P, P)."""
    matrix = dense(block).double()
    return torch.linalg.inv(matrix + precision * torch.eye(len(matrix), dtype=torch.float64))


def close(got, expected, tolerance=1e-4):
    """Asserts closeness relative to the largest entry."""
    scale = expected.abs().max().item()
    torch.testing.assert_close(got.to(expected), expected, atol=tolerance * scale, rtol=0)
