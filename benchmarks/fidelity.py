"""What each difference between BLoB's public code and this package does, one section a difference.

`python benchmarks/fidelity.py` runs the sections that need no model; a section's name runs that one. Each prints the
figures of docs/fidelity.md, with its sizes and seeds. "token-noise" fits and evaluates four posteriors on the embedded
questions, some minutes each, and keeps their logits in `--cache`; "prompts" asks a model without any fit.
"""

import math
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bayestune.adapters import GaussianLinear
from bayestune.cli.demo import TRAINING
from bayestune.jsonl import read_json_lines
from bayestune.kl import burst_period, kl_divergence, kl_weights, warmup_decay
from bayestune.kl.closed_form import kl_step_
from bayestune.metrics import accuracy, ece, nll, paired_bootstrap
from fidelity_fits import FITS, figures, prompts, say, shown, token_noise, truncation

ROWS = {"WG-S": 640, "ARC-C": 1119, "ARC-E": 2251, "WG-M": 2558, "OBQA": 4957, "BoolQ": 9427}
EVALUATED = {
    "WG": 1267,
    "ARC-C": 299,
    "ARC-E": 570,
    "OBQA": 500,
    "BoolQ": 3270,
    "Chem": 100,
    "Phy": 102,
}
PASSES, CHOICES = 20000, 2000  # of the noise; of rows to leave out
EPSILON, PRIOR, KL_LR, STEPS, BATCH = 1e-6, 0.2, 0.01, 5000, 4


# Noise


def noise_pairs(kind: str, first: Tensor, second: Tensor, passes: int) -> tuple[Tensor, Tensor]:
    """The noise of A·x at two tokens of one row, (passes, r) each; the mean map is taken off."""
    layer = GaussianLinear(
        nn.Linear(first.numel(), 8, bias=False), init_root_std=0.3, noise=kind
    ).train()  # type: ignore[arg-type]
    tokens = torch.stack([first, second])[None]
    with torch.no_grad():
        mean = nn.functional.linear(tokens, layer.weight)[0]
        noise = torch.stack([layer(tokens)[0] - mean for _ in range(passes)])
    return noise[:, 0], noise[:, 1]


def correlation(a: Tensor, b: Tensor) -> tuple[float, float]:
    """The mean over outputs of the correlation of two noises (passes, r), and its standard error over outputs."""
    each = (a * b).mean(0) / (a.square().mean(0) * b.square().mean(0)).sqrt()
    return each.mean().item(), each.std().item() / math.sqrt(len(each))


def noise_correlation(options: Namespace) -> None:
    """Two tokens' noise correlation, and the ratio of the forms' marginal variances."""
    torch.manual_seed(options.seed)
    width, passes = 64, PASSES
    x = torch.randn(width)
    other = 0.9 * x + math.sqrt(1 - 0.9**2) * torch.randn(width)
    cosine = nn.functional.cosine_similarity(x, other, dim=0).item()
    say(
        f"noise-correlation: k {width}, r 8, {passes} passes, seed {options.seed}; mean over outputs ± standard error"
    )
    variances = {}
    for kind in ("row", "token"):
        torch.manual_seed(options.seed)
        same, like = noise_pairs(kind, x, x, passes), noise_pairs(kind, x, other, passes)
        variances[kind] = same[0].var().item()
        (one, error), (two, error_two) = correlation(*same), correlation(*like)
        say(
            f"  {kind:5}  equal tokens {one:6.3f} ± {error:.3f}   cosine {cosine:.3f} {two:6.3f} ± {error_two:.3f}"
        )
    say(f"  marginal variance, token over row: {variances['token'] / variances['row']:.3f}")


# The KL


def kl_two_steps(options: Namespace) -> None:
    """The decoupled step against AdamW and then SGD on π·KL by autograd, on one random layer."""
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(options.seed)
        target = torch.randn(8, 64, dtype=dtype)
        mean, root = (
            torch.randn(8, 64, dtype=dtype) * 0.1,
            torch.rand(8, 64, dtype=dtype) * 0.015 + 0.035,
        )
        noise = torch.randn(50, 8, 64, dtype=dtype)
        runs = [
            run(mean.clone(), root.clone(), target, noise)
            for run in (_authors_steps, _decoupled_steps)
        ]
        worst = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*runs, strict=True)]
        ends = f"G from {root.mean():.3f} to {runs[1][1].mean():.3f}"
        say(f"kl-two-steps: 50 steps, 8×64, {dtype}, seed {options.seed}: {ends}")
        say(f"  largest difference over largest entry: M {worst[0]:.1e}, G {worst[1]:.1e}")


def _loss(mean: Tensor, root: Tensor, target: Tensor, noise: Tensor) -> Tensor:
    return (mean + root.square() * noise - target).square().mean()


def _authors_steps(
    mean: Tensor, root: Tensor, target: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    mean, root = mean.requires_grad_(), root.requires_grad_()
    adamw = torch.optim.AdamW([mean], 1e-3, eps=1e-6, weight_decay=0)
    sgd, weights = torch.optim.SGD([mean, root], KL_LR), kl_weights(len(noise), 10)
    for weight, e in zip(weights.tolist(), noise, strict=True):
        _loss(mean, root, target, e).backward()
        adamw.step()
        adamw.zero_grad()
        (weight * kl_divergence(mean, root.square(), PRIOR)).backward()
        sgd.step()
        sgd.zero_grad()
    return mean.detach(), root.detach()


def _decoupled_steps(
    mean: Tensor, root: Tensor, target: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    mean, root = mean.requires_grad_(), root.requires_grad_()
    adamw, weights = (
        torch.optim.AdamW([mean], 1e-3, eps=1e-6, weight_decay=0),
        kl_weights(len(noise), 10),
    )
    for weight, e in zip(weights.tolist(), noise, strict=True):
        of_mean, of_root = torch.autograd.grad(_loss(mean, root, target, e), (mean, root))
        mean.grad = of_mean
        adamw.step()
        kl_step_([mean], [root], KL_LR * weight, PRIOR)
        with torch.no_grad():
            root -= KL_LR * of_root
    return mean.detach(), root.detach()


def kl_with_epsilon(mean: Tensor, std: Tensor) -> Tensor:
    """The KL with 1e-6 added in the logarithms and to the denominator, in float64 as in the public code."""
    mean, std = mean.double(), std.double()
    part = (std.square() + mean.square()) / (2 * PRIOR**2 + EPSILON)
    return (math.log(PRIOR + EPSILON) - (std + EPSILON).log() + part - 0.5).sum()


def std_of_run(rows: int, epsilon: float) -> float:
    """Where σ ends under the published settings by the KL alone, with 1e-6 in the KL or without."""
    root = torch.linspace(0.05 / math.sqrt(2), 0.05, 101, dtype=torch.float64)
    steps = KL_LR * warmup_decay(STEPS) * kl_weights(STEPS, burst_period(rows, BATCH))
    for step in steps.tolist():
        gradient = -2 * root / (root.square() + epsilon) + 4 * root**3 / (2 * PRIOR**2 + epsilon)
        root = root - step * gradient
    return root.square().mean().item()


def kl_epsilon(options: Namespace) -> None:
    """The KL's value with and without 1e-6 and float64, and where σ ends."""
    generator = torch.Generator().manual_seed(options.seed)
    mean = (torch.rand(8, 4096, generator=generator) * 2 - 1) / 64  # as PEFT starts A, for k = 4096
    say(f"kl-epsilon: one layer of 8×4096, seed {options.seed}")
    for name, low, high in (("at the start", 0.00125, 0.0025), ("σ = 0.1", 0.1, 0.1)):
        std = torch.rand(8, 4096, generator=generator) * (high - low) + low
        ours, theirs = kl_divergence(mean.double(), std.double(), PRIOR), kl_with_epsilon(mean, std)
        single = kl_divergence(mean, std, PRIOR)
        say(
            f"  {name}: {ours:.1f} nats; with 1e-6 {(theirs / ours - 1).item():+.1e} relative, "
            f"in float32 {(single / ours - 1).item():+.1e}"
        )
    for name, rows in ROWS.items():
        ours, theirs = std_of_run(rows, 0.0), std_of_run(rows, EPSILON)
        say(
            f"  {name:5}  σ at the end {ours:.4f}, with 1e-6 {theirs:.4f} ({theirs / ours - 1:+.1e})"
        )


# Evaluation


def read_results(path: Path) -> tuple[Tensor, Tensor]:
    """Probabilities (N, C) and labels (N,) of a committed results file; 0 where a row has fewer options."""
    rows = list(read_json_lines(path))
    width = max(len(row["probabilities"]) for row in rows)
    probabilities = torch.tensor(
        [row["probabilities"] + [0.0] * (width - len(row["probabilities"])) for row in rows]
    )
    return probabilities.double(), torch.tensor([row["answer"] for row in rows])


def drop_last(options: Namespace) -> None:
    """What evaluating without the rows of the last, incomplete batch of four does."""
    say(
        "drop-last: rows left out in batches of 4: "
        + ", ".join(f"{n} {c % 4} of {c}" for n, c in EVALUATED.items())
    )
    say(
        f"  change of a figure when 3 random rows of 300 are left out, {CHOICES} choices, seed {options.seed}:"
    )
    for file in sorted((options.results / "arc_easy").glob("rows-*.jsonl")):
        probabilities, labels = read_results(file)
        generator = torch.Generator().manual_seed(options.seed)
        kept = (torch.randperm(len(labels), generator=generator)[3:] for _ in range(CHOICES))
        values = torch.stack([_three(probabilities[rows], labels[rows]) for rows in kept])
        off = (values - _three(probabilities, labels)).abs()
        parts = zip(
            ("ACC points", "ECE points", "NLL"),
            off.mean(0).tolist(),
            off.amax(0).tolist(),
            strict=True,
        )
        say(
            f"  {file.name}: "
            + ", ".join(f"{n} {m:.3f} on average, {x:.3f} at most" for n, m, x in parts)
        )


def _three(probabilities: Tensor, labels: Tensor) -> Tensor:
    values = (
        100 * accuracy(probabilities, labels),
        100 * ece(probabilities, labels),
        nll(probabilities, labels),
    )
    return torch.tensor(values, dtype=torch.float64)


def averaged(logits: Tensor) -> dict[str, Tensor]:
    """Probabilities (N, C) from draws (S, N, C), averaged as probabilities and as logits."""
    return {
        "probabilities": logits.double().softmax(-1).mean(0),
        "logits": logits.double().mean(0).softmax(-1),
    }


def _compared(title: str, logits: Tensor, labels: Tensor) -> None:
    both = averaged(logits)
    for name, p in both.items():
        say(f"  {title}, averaging {name}: {figures(p, labels)}")
    for metric in ("nll", "ece"):
        d = paired_bootstrap(both["logits"], both["probabilities"], labels, metric)
        say(f"    {metric} of logits − of probabilities {shown(d)}")


def logit_averaging(options: Namespace) -> None:
    """Averaging logits against averaging probabilities: simulated members, and a fit's draws where there are some."""
    probabilities, labels = read_results(options.results / "arc_easy" / "rows-1-mle-0-1.jsonl")
    centre = probabilities.clamp_min(1e-12).log().where(probabilities > 0, -torch.inf)
    say(
        f"logit-averaging: committed MLE logits of ARC-Easy plus N(0, spread²), three members, n {len(labels)}"
    )
    for spread in (1.0, 2.0, 4.0):
        generator = torch.Generator().manual_seed(options.seed)
        noise = spread * torch.randn(3, *centre.shape, generator=generator, dtype=torch.float64)
        _compared(f"spread {spread:.0f}", centre + noise, labels)
    file = options.cache / "row-constant.safetensors"
    if file.is_file():
        tensors = load_file(file)
        _compared("ten held draws of BLoB", tensors["row"], tensors["labels"])


SECTIONS: dict[str, Callable[[Namespace], None]] = {
    "noise-correlation": noise_correlation,
    "kl-two-steps": kl_two_steps,
    "kl-epsilon": kl_epsilon,
    "drop-last": drop_last,
    "logit-averaging": logit_averaging,
    "token-noise": token_noise,
    "prompts": prompts,
    "truncation": truncation,
}
NEED_A_MODEL = ("token-noise", "prompts", "truncation")


def options_of(arguments: Sequence[str] | None) -> Namespace:
    """The command's options."""
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    quick = [name for name in SECTIONS if name not in NEED_A_MODEL]
    parser.add_argument("sections", nargs="*", default=quick, help=f"among {', '.join(SECTIONS)}")
    parser.add_argument(
        "--model", default=None, help="directory or name; left out: SmolLM2-135M-Instruct"
    )
    parser.add_argument(
        "--data_root", type=Path, default=None, help="folder of the data sets; left out: the Hub"
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=Path(__file__).parents[1] / "results",
        help="committed results",
    )
    parser.add_argument(
        "--cache", type=Path, default=Path("runs/fidelity"), help="folder of the fits' logits"
    )
    parser.add_argument(
        "--fits", nargs="*", default=list(FITS), choices=list(FITS), help="of token-noise"
    )
    parser.add_argument("--tasks", nargs="*", default=["arc_easy"], help="of prompts")
    parser.add_argument("--rows", type=int, default=240, help="to evaluate on")
    parser.add_argument("--steps", type=int, default=TRAINING.steps, help="of each fit")
    parser.add_argument("--draws", type=int, default=10, help="of each posterior")
    parser.add_argument(
        "--seed", type=int, default=0, help="of random numbers; fits have the next one"
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"unknown sections: got {sorted(unknown)}, expected some of {list(SECTIONS)}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the sections."""
    options = options_of(arguments)
    for name in options.sections:
        SECTIONS[name](options)


if __name__ == "__main__":
    main()
