"""A module of your own, no transformers model: LoRA by PEFT, a Gaussian over it, and a curve.

    python examples/custom_module.py

A small network learns sin(x) as any network does; then LoRA adapts it to other numbers, which it
sees between -2 and 2 only. Expect the adapted curve there, and a deviation ("not known") that grows
outside, yet less than the error does: it is of adapters, not of what the network cannot say.
"""

import argparse
from collections.abc import Sequence

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import mse_loss

from bayestune import Gaussian, KLStep, Regression, bayesify, predict

NOISE = 0.1


def pretrained(width: int, steps: int) -> nn.Sequential:
    parts = (nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
    model = nn.Sequential(*parts, nn.Linear(width, 1))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        x = torch.rand(64, 1) * 8 - 4
        mse_loss(model(x), x.sin()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--draws", type=int, default=50)
    given = parser.parse_args(arguments)

    torch.manual_seed(0)
    lora = LoraConfig(r=8, lora_alpha=8, target_modules=["0", "2", "4"])
    model = get_peft_model(pretrained(64, given.steps), lora)  # type: ignore[arg-type]
    bayesify(model)
    x = torch.rand(40, 1) * 4 - 2
    y = x.sin() + 0.5 * x + NOISE * torch.randn(40, 1)

    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    KLStep(prior_std=1.0, final_std=0.2).attach(model, optimizer, total_steps=given.steps)
    model.train()
    for _ in range(given.steps):
        mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    grid = torch.arange(-6.0, 7.0, 1.0)[:, None]
    posterior = Gaussian(model, lambda model, batch: model(batch["x"]))  # the scorer: (N, 1)
    found = predict(posterior, {"x": grid}, given.draws, likelihood=Regression(NOISE**2))
    for row, place in enumerate(grid[:, 0].tolist()):
        truth = torch.tensor(place).sin().item() + 0.5 * place
        told = f"predicted {found.mean[row].item():+.2f}, not known"
        print(
            f"x {place:+.0f}, truth {truth:+.2f}, {told} ±{found.epistemic[row].sqrt().item():.2f}"
        )


if __name__ == "__main__":
    main()
