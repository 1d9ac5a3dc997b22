"""What each difference between BLoB's public code and this package does, one section a difference.

`python -m studies.fidelity` runs the sections that need no model; a section's name runs that one.
Each prints the figures of docs/fidelity.md, with its sizes and seeds. "token-noise" fits four
posteriors on the embedded questions, some minutes each, and keeps their logits in `--cache`;
"prompts" asks a model without any fit.
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
from bayestune.kl import burst_period, kl_divergence, kl_weights, warmup_decay
from bayestune.kl.closed_form import kl_step_
from bayestune.metrics import accuracy, ece, nll, paired_bootstrap
from bayestune.whole_files import read_json_lines
from studies.fidelity_fits import FITS, figures, prompts, say, shown, token_noise, truncation

ROWS = {"WG-S": 640, "ARC-C": 1119, "ARC-E": 2251, "WG-M": 2558, "OBQA": 4957, "BoolQ": 9427}
EVALUATED = {"WG": 1267, "ARC-C": 299, "ARC-E": 570, "OBQA": 500, "BoolQ": 3270}
EVALUATED |= {"Chem": 100, "Phy": 102}
PASSES = 20000  # of the noise
CHOICES = 2000  # of rows to leave out
# The published settings: what is added in the KL, σ_p, the KL's rate, steps and batch.
EPSILON = 1e-6
PRIOR = 0.2
KL_LR = 0.01
STEPS = 5000
BATCH = 4


# Noise


def noise_pairs(kind: str, first: Tensor, second: Tensor, passes: int) -> tuple[Tensor, Tensor]:
    """The noise of A·x at two tokens of one row, (passes, r) each; the mean map is taken off."""
    linear = nn.Linear(first.numel(), 8, bias=False)
    layer = GaussianLinear(linear, init_root_std=0.3, noise=kind).train()  # type: ignore[arg-type]
    tokens = torch.stack([first, second])[None]
    with torch.no_grad():
        mean = nn.functional.linear(tokens, layer.weight)[0]
        noise = torch.stack([layer(tokens)[0] - mean for _ in range(passes)])
    return noise[:, 0], noise[:, 1]


def correlation(a: Tensor, b: Tensor) -> tuple[float, float]:
    """The mean over outputs of two noises' (passes, r) correlation, and its standard error."""
    each = (a * b).mean(0) / (a.square().mean(0) * b.square().mean(0)).sqrt()
    return each.mean().item(), each.std().item() / math.sqrt(len(each))


def noise_correlation(options: Namespace) -> None:
    """Two tokens' noise correlation, and the ratio of the forms' marginal variances."""
    torch.manual_seed(options.seed)
    width = 64
    x = torch.randn(width)
    other = 0.9 * x + math.sqrt(1 - 0.9**2) * torch.randn(width)
    cosine = nn.functional.cosine_similarity(x, other, dim=0).item()
    sizes = f"k {width}, r 8, {PASSES} passes, seed {options.seed}"
    say(f"noise-correlation: {sizes}; mean over outputs ± standard error")
    variances = {}
    for kind in ("row", "token"):
        torch.manual_seed(options.seed)
        same = noise_pairs(kind, x, x, PASSES)
        like = noise_pairs(kind, x, other, PASSES)
        variances[kind] = same[0].var().item()
        one, error = correlation(*same)
        two, error_two = correlation(*like)
        equal = f"equal tokens {one:6.3f} ± {error:.3f}"
        say(f"  {kind:5}  {equal}   cosine {cosine:.3f} {two:6.3f} ± {error_two:.3f}")
    ratio = variances["token"] / variances["row"]
    say(f"  marginal variance, token over row: {ratio:.3f}")


# The KL


def kl_two_steps(options: Namespace) -> None:
    """The decoupled step against AdamW and then SGD on π·KL by autograd, on one random layer."""
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(options.seed)
        target = torch.randn(8, 64, dtype=dtype)
        mean = torch.randn(8, 64, dtype=dtype) * 0.1
        root = torch.rand(8, 64, dtype=dtype) * 0.015 + 0.035
        noise = torch.randn(50, 8, 64, dtype=dtype)
        theirs = _authors_steps(mean.clone(), root.clone(), target, noise)
        ours = _decoupled_steps(mean.clone(), root.clone(), target, noise)
        worst = []
        for one, other in zip(theirs, ours, strict=True):
            worst.append(((one - other).abs().max() / other.abs().max()).item())
        ends = f"G from {root.mean():.3f} to {ours[1].mean():.3f}"
        say(f"kl-two-steps: 50 steps, 8×64, {dtype}, seed {options.seed}: {ends}")
        say(f"  largest difference over largest entry: M {worst[0]:.1e}, G {worst[1]:.1e}")


def _loss(mean: Tensor, root: Tensor, target: Tensor, noise: Tensor) -> Tensor:
    return (mean + root.square() * noise - target).square().mean()


def _adamw(mean: Tensor) -> torch.optim.Optimizer:
    return torch.optim.AdamW([mean], 1e-3, eps=1e-6, weight_decay=0)


def _authors_steps(
    mean: Tensor, root: Tensor, target: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    adamw = _adamw(mean.requires_grad_())
    sgd = torch.optim.SGD([mean, root.requires_grad_()], KL_LR)
    for weight, e in zip(kl_weights(len(noise), 10).tolist(), noise, strict=True):
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
    adamw = _adamw(mean.requires_grad_())
    root.requires_grad_()
    for weight, e in zip(kl_weights(len(noise), 10).tolist(), noise, strict=True):
        loss = _loss(mean, root, target, e)
        mean.grad, of_root = torch.autograd.grad(loss, (mean, root))
        adamw.step()
        kl_step_([mean], [root], KL_LR * weight, PRIOR)
        with torch.no_grad():
            root -= KL_LR * of_root
    return mean.detach(), root.detach()


def kl_with_epsilon(mean: Tensor, std: Tensor) -> Tensor:
    """The KL as in the public code: float64, 1e-6 added in the logarithms and to 2σ_p²."""
    std = std.double()
    part = (std.square() + mean.double().square()) / (2 * PRIOR**2 + EPSILON)
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
    # M is as PEFT starts A, for k = 4096.
    mean = (torch.rand(8, 4096, generator=generator) * 2 - 1) / 64
    say(f"kl-epsilon: one layer of 8×4096, seed {options.seed}")
    for name, low, high in (("at the start", 0.00125, 0.0025), ("σ = 0.1", 0.1, 0.1)):
        std = torch.rand(8, 4096, generator=generator) * (high - low) + low
        exact = kl_divergence(mean.double(), std.double(), PRIOR)
        theirs = (kl_with_epsilon(mean, std) / exact - 1).item()
        single = (kl_divergence(mean, std, PRIOR) / exact - 1).item()
        parts = f"with 1e-6 {theirs:+.1e} relative, in float32 {single:+.1e}"
        say(f"  {name}: {exact:.1f} nats; {parts}")
    for name, rows in ROWS.items():
        ours = std_of_run(rows, 0.0)
        theirs = std_of_run(rows, EPSILON)
        change = f"{theirs / ours - 1:+.1e}"
        say(f"  {name:5}  σ at the end {ours:.4f}, with 1e-6 {theirs:.4f} ({change})")


# Evaluation


def read_results(path: Path) -> tuple[Tensor, Tensor]:
    """Probabilities (N, C), 0 where a row has fewer options, and labels (N,) of a results file."""
    rows = list(read_json_lines(path))
    width = max(len(row["probabilities"]) for row in rows)
    padded = []
    for row in rows:
        padded.append(row["probabilities"] + [0.0] * (width - len(row["probabilities"])))
    return torch.tensor(padded).double(), torch.tensor([row["answer"] for row in rows])


def drop_last(options: Namespace) -> None:
    """What evaluating without the rows of the last, incomplete batch of four does."""
    parts = ", ".join(f"{name} {count % 4} of {count}" for name, count in EVALUATED.items())
    say(f"drop-last: rows left out in batches of 4: {parts}")
    what = "change of a figure when 3 random rows of 300 are left out"
    say(f"  {what}, {CHOICES} choices, seed {options.seed}:")
    for file in sorted((options.results / "arc_easy").glob("rows-*.jsonl")):
        probabilities, labels = read_results(file)
        whole = _three(probabilities, labels)
        generator = torch.Generator().manual_seed(options.seed)
        values = []
        for _ in range(CHOICES):
            rows = torch.randperm(len(labels), generator=generator)[3:]
            values.append(_three(probabilities[rows], labels[rows]))
        off = (torch.stack(values) - whole).abs()
        parts = []
        for name, changes in zip(("ACC points", "ECE points", "NLL"), off.T, strict=True):
            parts.append(f"{name} {changes.mean():.3f} on average, {changes.max():.3f} at most")
        say(f"  {file.name}: {', '.join(parts)}")


def _three(probabilities: Tensor, labels: Tensor) -> Tensor:
    percent = [100 * metric(probabilities, labels) for metric in (accuracy, ece)]
    return torch.tensor([*percent, nll(probabilities, labels)], dtype=torch.float64)


def averaged(logits: Tensor) -> dict[str, Tensor]:
    """Probabilities (N, C) from draws (S, N, C), averaged as probabilities and as logits."""
    logits = logits.double()
    return {"probabilities": logits.softmax(-1).mean(0), "logits": logits.mean(0).softmax(-1)}


def _compare(title: str, logits: Tensor, labels: Tensor) -> None:
    both = averaged(logits)
    for name, probabilities in both.items():
        say(f"  {title}, averaging {name}: {figures(probabilities, labels)}")
    found = paired_bootstrap(both["logits"], both["probabilities"], labels, "nll")
    say(f"    nll of logits − of probabilities {shown(found)}")


def logit_averaging(options: Namespace) -> None:
    """Averaging logits against averaging probabilities.

    The members are simulated; where `token_noise` has kept a fit's draws, they are compared too.
    """
    probabilities, labels = read_results(options.results / "arc_easy" / "rows-1-mle-0-1.jsonl")
    centre = probabilities.clamp_min(1e-12).log().where(probabilities > 0, -torch.inf)
    what = "committed MLE logits of ARC-Easy plus N(0, spread²), three members"
    say(f"logit-averaging: {what}, n {len(labels)}")
    for spread in (1.0, 2.0, 4.0):
        generator = torch.Generator().manual_seed(options.seed)
        noise = torch.randn(3, *centre.shape, generator=generator, dtype=torch.float64)
        _compare(f"spread {spread:.0f}", centre + spread * noise, labels)
    file = options.cache / "row-constant.safetensors"
    if file.is_file():
        tensors = load_file(file)
        _compare("ten held draws of BLoB", tensors["row"], tensors["labels"])


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
NEED_NO_MODEL = list(SECTIONS)[:5]


def parser() -> ArgumentParser:
    """The command's options."""
    made = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    add = made.add_argument
    results = Path(__file__).parents[1] / "results"
    cache = Path("runs/fidelity")
    fits = list(FITS)
    add("sections", nargs="*", default=NEED_NO_MODEL, help=f"among {', '.join(SECTIONS)}")
    add("--model", default=None, help="directory or name; left out: SmolLM2-135M-Instruct")
    add("--data_root", type=Path, default=None, help="folder of the data sets; left out: the Hub")
    add("--results", type=Path, default=results, help="committed results")
    add("--cache", type=Path, default=cache, help="folder of the fits' logits")
    add("--fits", nargs="*", default=fits, choices=fits, help="of token-noise")
    add("--tasks", nargs="*", default=["arc_easy"], help="of prompts")
    add("--rows", type=int, default=240, help="to evaluate on")
    add("--steps", type=int, default=TRAINING.steps, help="of each fit")
    add("--draws", type=int, default=10, help="of each posterior")
    add("--seed", type=int, default=0, help="of random numbers; fits have the next one")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the sections."""
    made = parser()
    options = made.parse_args(arguments)
    if unknown := set(options.sections) - set(SECTIONS):
        expected = f"expected some of {list(SECTIONS)}"
        made.error(f"unknown sections: got {sorted(unknown)}, {expected}")
    for name in options.sections:
        SECTIONS[name](options)


if __name__ == "__main__":
    main()
