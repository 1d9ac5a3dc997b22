"""Draws the pictures of docs/explanation/blob_in_pictures.md from fits of the package.

    python docs/making/blob_pictures.py

The model is the smallest that has an adapter: a linear map of the plane to two classes whose base
weights are zero, with a LoRA of rank 1. So A has two weights, and q(A) can be drawn.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from bayestune import Gaussian, KLStep, bayesify, predict

mpl.use("Agg")
import matplotlib.pyplot as plt

IMAGES = Path(__file__).parents[1] / "images"
STEPS, DRAWS = 300, 40
PRIOR_STD, FINAL_STD = 1.0, 0.6
BLUE, VERMILLION, GREY = "#0072b2", "#d55e00", "#666666"


class Plane(nn.Module):
    """A linear map of the plane to two classes, zero but for what an adapter adds."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 2, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Class logits (N, 2) of points (N, 2)."""
        return self.head(x)


class Fit(NamedTuple):
    """An adapted model, and the mean standard deviation of A after each step."""

    model: Any
    stds: list[float]


def points(num_rows: int = 24) -> tuple[Tensor, Tensor]:
    """Two overlapping clouds (N, 2) and their labels (N,)."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(num_rows) % 2
    centres = torch.tensor([[-0.7, -0.4], [0.7, 0.4]])
    return centres[labels] + 0.7 * torch.randn(num_rows, 2, generator=generator), labels


def fitted(x: Tensor, y: Tensor, final_std: float | None) -> Fit:
    """A fit of the two clouds: plain LoRA, or BLoB where a final standard deviation is given."""
    torch.manual_seed(1)
    lora = LoraConfig(target_modules=["head"], r=1, lora_alpha=1)
    model: Any = get_peft_model(Plane(), lora)  # type: ignore[arg-type]
    model.get_submodule("base_model.model.head.lora_B.default").weight.data.fill_(0.5)
    if final_std is not None:
        bayesify(model)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.0)
    if final_std is not None:
        step = KLStep(prior_std=PRIOR_STD, final_std=final_std)
        step.attach(model, optimizer, total_steps=STEPS)
    stds = []
    model.train()
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        slot = model.get_submodule("base_model.model.head.lora_A.default")
        stds.append(slot.std.mean().item() if final_std is not None else 0.0)
    return Fit(model.eval(), stds)


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The scorer: the model's outputs are class logits already."""
    return model(batch["x"])


def drawn_weights(posterior: Gaussian, index: int) -> Tensor:
    """The two weights of A in a draw; B is a point."""
    (weight,) = [value for name, value in posterior.draw(index).items() if "lora_A" in name]
    return weight.detach()[0]


def weights_and_lines(axes: Any, posterior: Gaussian, x: Tensor, y: Tensor) -> None:
    """On the left q(A) and its draws, on the right the boundary of each draw."""
    left, right = axes
    drawn_a = [drawn_weights(posterior, index) for index in range(DRAWS)]
    slot = posterior.model.get_submodule("base_model.model.head.lora_A.default")
    mean, std = slot.weight.detach()[0], slot.std.detach()[0]
    turn = torch.linspace(0, 2 * math.pi, 200)
    for radius in (1, 2):
        ring = mean[:, None] + radius * std[:, None] * torch.stack([turn.cos(), turn.sin()])
        left.plot(*ring, color=GREY, linewidth=1)
    left.plot(*torch.stack(drawn_a).T, "o", color=BLUE, markersize=4, label="draws")
    left.plot(*mean, "D", color=VERMILLION, markersize=7, label="mean M")
    left.set(xlabel="first weight of A", ylabel="second weight of A", title="q(A): two weights")
    left.legend()
    ends = torch.tensor([-3.0, 3.0])
    for a in drawn_a:
        right.plot(ends, -a[0] / a[1] * ends, color=BLUE, linewidth=0.6, alpha=0.6)
    right.plot(ends, -mean[0] / mean[1] * ends, color=VERMILLION, linewidth=2)
    clouds(right, x, y)
    right.set(title="each draw's boundary; thick: the mean's")


def clouds(axes: Any, x: Tensor, y: Tensor) -> None:
    """The training rows, with a shape for each class."""
    for label, marker in ((0, "o"), (1, "^")):
        axes.plot(*x[y == label].T, marker, color="white", markeredgecolor="black", markersize=6)
    axes.set(xlim=(-3, 3), ylim=(-3, 3))


def confidence_maps(axes: Any, maps: dict[str, Tensor], rows: tuple[Tensor, Tensor]) -> Any:
    """Maps of the plane side by side, on one scale."""
    shown = None
    for one, (title, values) in zip(axes, maps.items(), strict=True):
        limits = (0.0, 0.6) if "information" in title else (0.5, 1.0)
        grid = values.reshape(80, 80)
        shown = one.imshow(
            grid, origin="lower", extent=(-3, 3, -3, 3), vmin=limits[0], vmax=limits[1]
        )
        one.figure.colorbar(shown, ax=one, shrink=0.75)
        clouds(one, *rows)
        one.set_title(title)
    return shown


def main() -> None:
    """Fits, and writes the three pictures."""
    x, y = points()
    plain, blob = fitted(x, y, None), fitted(x, y, FINAL_STD)
    posterior = Gaussian(blob.model, logits)

    figure, axes = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
    weights_and_lines(axes, posterior, x, y)
    figure.savefig(IMAGES / "blob_weights.png", dpi=110)

    side = torch.linspace(-3, 3, 80)
    plane = {"x": torch.cartesian_prod(side, side).flip(1)}
    with torch.no_grad():
        sure = plain.model(plane["x"]).softmax(-1).max(-1).values
    averaged = predict(posterior, plane, draws=DRAWS)
    maps = {
        "plain LoRA: confidence": sure,
        f"average of {DRAWS} draws: confidence": averaged.probabilities.max(-1).values,
        "mutual information, nats": averaged.mutual_information,
    }
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.9), layout="constrained")
    confidence_maps(axes, maps, (x, y))
    figure.savefig(IMAGES / "blob_plane.png", dpi=110)

    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    axis.plot(blob.stds, color=BLUE, label="measured, mean over A")
    axis.axhline(FINAL_STD, color=VERMILLION, linestyle="--", label="final_std")
    axis.axhline(PRIOR_STD, color=GREY, linestyle=":", label="prior_std")
    axis.set(xlabel="step", ylabel="σ", ylim=(0, 1.1))
    axis.legend()
    figure.savefig(IMAGES / "blob_std.png", dpi=110)
    print(
        {
            "σ at the end": blob.stds[-1],
            "largest information": maps["mutual information, nats"].max(),
        }
    )


if __name__ == "__main__":
    main()
