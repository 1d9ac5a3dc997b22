"""Ten held draws in one forward pass over the same ten in ten passes, and over the mean's pass.

The draws are generated before the clock starts. "Ten passes" is the library's own path with room
for one draw at a time, so both sides share all code but the batching, and both must give the same
logits. Here every row reads all its tokens; the last lines say what is saved where the tokens that
all rows begin with are read once and kept.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bayestune.adapters import GaussianLinear, Slots
from bayestune.forward import Draws, without_common_prefix
from bayestune.posteriors import Gaussian
from harness import Action, Case, compare, parser_of, run
from subjects import (
    OURS,
    Batch,
    adapt,
    add_model_options,
    add_prompt_options,
    autocast,
    model_name,
    random_llama,
    random_tokens,
    real_prompts,
)

Score = Callable[[nn.Module, Batch], Tensor]
ONE, SEPARATE, MEAN = "one pass", "separate passes", "mean"
KEPT, KEPT_MEAN = "one pass, beginning kept", "mean, beginning kept"
TRAINED_ROOT_STD = 0.1**0.5  # σ = 0.1, about what training ends at
ROUNDING = {"fp32": 0.01, "bf16": 0.5}  # of the draws' spread; other draws would be at 1.4


def first_four(model: nn.Module, batch: Batch) -> Tensor:
    """Logits of four tokens at the last position: a scorer for random tokens."""
    return model(**batch, use_cache=False, logits_to_keep=1).logits[:, -1, :4].float()


def as_if_trained(adapted: nn.Module) -> nn.Module:
    """The model in evaluation mode, with B not zero and σ of a usual size, so that draws differ."""
    with torch.no_grad():
        for layer in Slots(adapted).of_kind(GaussianLinear).values():
            layer.root_std.fill_(TRAINED_ROOT_STD)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return adapted.eval()


@dataclass(frozen=True)
class Subject:
    """A posterior and the batches that it predicts."""

    posterior: Gaussian
    batches: Sequence[Batch]
    device: torch.device
    precision: str

    def kept(self, draws: Draws, turn: int) -> Tensor:
        """Class logits (S, N, C); what the rows begin with is read once and kept."""
        with autocast(self.device, self.precision):
            return self.posterior.logits(self.batches[turn % len(self.batches)], draws)

    def logits(self, draws: Draws, turn: int) -> Tensor:
        """Class logits (S, N, C) where every row reads all its tokens."""
        with without_common_prefix():
            return self.kept(draws, turn)

    def ways(self, draws: int, rows: int) -> dict[str, Action]:
        """Draws in one pass, in as many passes, and the mean; the draws are made here."""
        counts = {ONE: Draws(draws), SEPARATE: Draws(draws, max_rows=rows), MEAN: Draws(0)}
        self.logits(counts[ONE], 0)
        return {
            name: lambda turn, which=which: self.logits(which, turn)
            for name, which in counts.items()
        }


def check(one: Tensor, other: Tensor, precision: str) -> float:
    """The largest difference of two ways to the same draws' logits.

    Raises:
        AssertionError: if it is more than rounding, or the draws are all alike.
    """
    one = one.nan_to_num(neginf=0.0)
    other = other.nan_to_num(neginf=0.0)
    spread = one.std(0).square().mean().sqrt().item()
    gap = (one - other).square().mean().sqrt().item()
    if not spread > 0:
        raise AssertionError("the draws are all alike: no noise reached the adapters")
    if not gap <= ROUNDING[precision] * spread:
        raise AssertionError(
            f"two ways to the same logits disagree: got a gap of {gap:.3g}, the spread of the "
            f"draws is {spread:.3g}"
        )
    return (one - other).abs().max().item()


def synthetic_batches(options: Namespace, device: torch.device) -> list[Batch]:
    """Batches of random tokens whose rows all begin alike."""
    beginning = random_tokens(options.vocab, 1, options.common, device)
    batches = []
    for _ in range(options.batches):
        ids = random_tokens(options.vocab, options.rows, options.length, device)
        ids[:, : options.common] = beginning
        batches.append({"input_ids": ids})
    return batches


def posterior_of(base: nn.Module, score: Score, rank: int) -> Gaussian:
    """A posterior on a plain model, as if trained."""
    return Gaussian(as_if_trained(adapt(base, OURS, rank)), score)


def opened(options: Namespace, device: torch.device) -> tuple[Gaussian, Sequence[Batch], str]:
    """Posterior, batches and title: a real model on real prompts, or random ones."""
    if options.synthetic:
        posterior = posterior_of(random_llama(options).to(device), first_four, options.rank)
        size = f"{options.rows}×{options.length} tokens, the first {options.common} alike"
        batches = synthetic_batches(options, device)
        return posterior, batches, f"{model_name(options)}, {size}"
    prompts = real_prompts(options, device, "evaluation")
    posterior = posterior_of(prompts.model, prompts.scorer, options.rank)
    size = f"{options.rows} prompts of {prompts.mean_length:.0f} tokens on average"
    return posterior, prompts.batches, f"{model_name(options)}, {options.task}, {size}"


def cases_of(subject: Subject, options: Namespace) -> tuple[list[Case], float]:
    """The cases of a precision, and the largest difference between the ways' logits."""
    together = Draws(options.draws)
    actions = subject.ways(options.draws, options.rows)
    actions[KEPT] = lambda turn: subject.kept(together, turn)
    actions[KEPT_MEAN] = lambda turn: subject.kept(Draws(0), turn)
    for turn in range(len(subject.batches)):  # reads what the rows begin with
        actions[KEPT_MEAN](turn)
        actions[KEPT](turn)
    plain = subject.logits(together, 0)
    others = [actions[name](0) for name in (SEPARATE, KEPT)]
    apart = max(check(plain, other, subject.precision) for other in others)
    count = f"{options.draws} draws"
    begun = "what rows begin with kept / read by each row"
    lines = {
        f"{count} in one pass / in {options.draws} passes": (ONE, SEPARATE),
        f"{count} in one pass / mean's pass": (ONE, MEAN),
        f"{count} in {options.draws} passes / mean's pass": (SEPARATE, MEAN),
        f"{count}, {begun}": (KEPT, ONE),
        f"mean, {begun}": (KEPT_MEAN, MEAN),
        f"{count} / mean's pass, it kept in both": (KEPT, KEPT_MEAN),
    }
    titled = {f"{name}, {subject.precision}": pair for name, pair in lines.items()}
    return compare(actions, titled, options, subject.device), apart


def parser() -> ArgumentParser:
    """The command's options."""
    made = parser_of(__doc__, repeats=20)
    add_model_options(made)
    add_prompt_options(made, rows=8)
    add = made.add_argument
    add("--synthetic", action="store_true", help="a random Llama and random tokens; no files")
    add("--length", type=int, default=64, help="tokens of a synthetic row")
    add("--common", type=int, default=16, help="tokens that all synthetic rows begin with")
    add("--draws", type=int, default=10, help="how many")
    return made


def measure(options: Namespace, device: torch.device) -> tuple[str, list[Case]]:
    """The cases of every precision."""
    posterior, batches, text = opened(options, device)
    cases = []
    differences = []
    for precision in options.precisions:
        found, apart = cases_of(Subject(posterior, batches, device, precision), options)
        cases += found
        differences.append(f"{apart:.2g} ({precision})")
    gap = f"the ways' logits differ by at most {', '.join(differences)}"
    return f"Held draws: {text}; {gap}", cases


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and reports."""
    made = parser()
    options = made.parse_args(arguments)
    if not options.synthetic and options.model is None:
        made.error("nothing to measure: give --model (and --data_root), or --synthetic")
    run("draws", options, measure)


if __name__ == "__main__":
    main()
