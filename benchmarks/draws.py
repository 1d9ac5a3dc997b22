"""Ten held draws in one forward pass over the same ten in ten passes, and over one pass of the mean.

The draws are generated before the clock starts. "Ten passes" is the library's own path with room for one draw at a
time, so both sides share all code but the batching; both must give the same logits. Here every row reads all its
tokens; the last lines say what is saved where the tokens that all rows begin with are read once and kept.
"""

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bayestune.adapters import gaussian_layers
from bayestune.forward import Batch, Draws
from bayestune.forward.common_prefix import without_common_prefix
from bayestune.posteriors import Gaussian
from harness import Case, device_of, environment, interleave, parser_of, report, timed_case
from subjects import (
    PRECISIONS,
    SIZES,
    adapt,
    add_model_options,
    add_prompt_options,
    autocast,
    random_llama,
    random_tokens,
    real_prompts,
)

PASSES_BAR, MEAN_BAR = 1.0, 5.0
ONE, SEPARATE, MEAN = "one pass", "separate passes", "mean"
KEPT, KEPT_MEAN = "one pass, beginning kept", "mean, beginning kept"
TRAINED_ROOT_STD = 0.1**0.5  # σ = 0.1, about what training ends at


@dataclass(frozen=True)
class Subject:
    """A posterior and the batches that it predicts."""

    posterior: Gaussian
    batches: Sequence[Batch]
    text: str


def first_four(model: nn.Module, batch: Batch) -> Tensor:
    """Logits of four tokens at the last position: a scorer for random tokens."""
    return (
        model(input_ids=batch["input_ids"], use_cache=False, logits_to_keep=1)
        .logits[:, -1, :4]
        .float()
    )


def gaussian(model: nn.Module, score: Callable[[nn.Module, Batch], Tensor], rank: int) -> Gaussian:
    """A posterior as if trained on a plain model."""
    return as_if_trained(adapt(model, "row", rank), score)


def as_if_trained(adapted: nn.Module, score: Callable[[nn.Module, Batch], Tensor]) -> Gaussian:
    """A posterior as if trained: B not zero and σ of a usual size, so that draws differ."""
    with torch.no_grad():
        for layer in gaussian_layers(adapted).values():
            layer.root_std.fill_(TRAINED_ROOT_STD)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return Gaussian(adapted.eval(), score)


def subject(options: Namespace, device: torch.device) -> Subject:
    """The real model on real prompts, or the synthetic one on random tokens."""
    if not options.synthetic:
        prompts = real_prompts(options, device, "evaluation")
        text = f"{options.model}, {options.task}, {options.rows} prompts of {prompts.mean_length:.0f} tokens on average"
        return Subject(gaussian(prompts.model, prompts.scorer, options.rank), prompts.batches, text)
    model = random_llama(options).to(device)
    batches = [
        random_tokens(options.vocab, options.rows, options.length, device)
        for _ in range(options.batches)
    ]
    for ids in batches[1:]:
        ids[:, : options.common] = batches[0][0, : options.common]
    batches[0][:, : options.common] = batches[0][0, : options.common].clone()
    batches = [{"input_ids": ids} for ids in batches]
    text = (
        f"random Llama, {options.layers} layers of {options.hidden}, {options.rows}×{options.length} tokens, the first "
        f"{options.common} alike"
    )
    return Subject(gaussian(model, first_four, options.rank), batches, text)


def check(one: Tensor, other: Tensor, precision: str) -> float:
    """The largest difference of two ways' logits; refuses one that rounding cannot make, and draws all alike."""
    one, other = one.nan_to_num(neginf=0.0), other.nan_to_num(neginf=0.0)
    difference, scale = (one - other).abs().max().item(), max(1.0, other.abs().max().item())
    if difference > scale * (1e-3 if precision == "fp32" else 0.1):
        raise AssertionError(
            f"two ways to the same logits disagree: got a difference of {difference:.3g}"
        )
    if len(one) > 1 and not one.std(0).any():
        raise AssertionError("the draws are all alike: no noise reached the adapters")
    return difference


def measure(
    one: Subject, options: Namespace, device: torch.device, precision: str
) -> tuple[list[Case], float]:
    """The cases of a precision, and the largest difference of the ways' logits."""

    def kept(draws: Draws, turn: int) -> Tensor:
        with autocast(device, precision):
            return one.posterior.logits(one.batches[turn % len(one.batches)], draws)

    def logits(draws: Draws, turn: int) -> Tensor:
        with without_common_prefix():
            return kept(draws, turn)

    together, alone, mean = (
        Draws(options.draws),
        Draws(options.draws, max_rows=options.rows),
        Draws(0),
    )
    plain = logits(together, 0)  # also generates the draws
    for turn in range(len(one.batches)):  # reads what the rows begin with
        kept(mean, turn)
        kept(together, turn)
    difference = max(
        check(plain, logits(alone, 0), precision), check(plain, kept(together, 0), precision)
    )
    actions = {
        ONE: lambda turn: logits(together, turn),
        SEPARATE: lambda turn: logits(alone, turn),
        MEAN: lambda turn: logits(mean, turn),
        KEPT: lambda turn: kept(together, turn),
        KEPT_MEAN: lambda turn: kept(mean, turn),
    }
    seconds = interleave(actions, options.repeats, warmup=options.warmup, device=device)
    return cases_of(seconds, options.draws, precision), difference


def cases_of(seconds: Mapping[str, Sequence[float]], count: int, precision: str) -> list[Case]:
    """The lines of the table."""
    begun = "what rows begin with kept / read by each row"
    return [
        timed_case(
            f"{count} draws in one pass / in {count} passes, {precision}",
            seconds,
            (ONE, SEPARATE),
            PASSES_BAR,
        ),
        timed_case(
            f"{count} draws in one pass / mean's pass, {precision}", seconds, (ONE, MEAN), MEAN_BAR
        ),
        timed_case(
            f"{count} draws in {count} passes / mean's pass, {precision}",
            seconds,
            (SEPARATE, MEAN),
            None,
        ),
        timed_case(f"{count} draws, {begun}, {precision}", seconds, (KEPT, ONE), None),
        timed_case(f"mean, {begun}, {precision}", seconds, (KEPT_MEAN, MEAN), None),
        timed_case(
            f"{count} draws / mean's pass, it kept in both, {precision}",
            seconds,
            (KEPT, KEPT_MEAN),
            MEAN_BAR,
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and reports."""
    parser = parser_of(__doc__, repeats=20)
    add_model_options(parser)
    add_prompt_options(parser, rows=8)
    parser.add_argument(
        "--synthetic",
        action="store_true",
        help=f"a random Llama ({SIZES}) and random tokens; no files",
    )
    parser.add_argument("--length", type=int, default=64, help="tokens of a synthetic row")
    parser.add_argument(
        "--common", type=int, default=16, help="tokens that all synthetic rows begin with"
    )
    parser.add_argument("--draws", type=int, default=10, help="how many")
    parser.add_argument(
        "--precisions",
        choices=PRECISIONS,
        nargs="+",
        default=list(PRECISIONS),
        help="each measured",
    )
    options = parser.parse_args(arguments)
    if not options.synthetic and options.model is None:
        parser.error("nothing to measure: give --model (and --data_root), or --synthetic")
    device = device_of(options)
    where, one = environment(device), subject(options, device)
    cases, differences = [], []
    for precision in options.precisions:
        found, difference = measure(one, options, device, precision)
        cases += found
        differences.append(f"{difference:.2g} ({precision})")
    title = f"Held draws: {one.text}; the ways' logits differ by at most {', '.join(differences)}"
    report("draws", title, cases, options, where)


if __name__ == "__main__":
    main()
