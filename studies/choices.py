"""Defaults that were chosen by a measurement, one section a choice.

"attention": a training step with eager over torch's fused attention, by the length of the rows.
"allocator": a task step and ten held draws with freed memory kept over the C library's defaults.
"text_step": text scoring with question and options packed in one sequence over a sequence for each.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from bayestune.forward import Draws
from bayestune.posteriors import Gaussian
from bayestune.runtime import keep_freed_memory
from bayestune.scoring import make_scorer
from bayestune.training.cpu_attention import eager_attention
from draws import as_if_trained
from harness import Action, Case, compare, parser_of, run
from subjects import (
    OURS,
    Prompts,
    TrainingStep,
    adapt,
    adapt_all,
    add_model_options,
    add_prompt_options,
    autocast,
    base_model,
    batches_of,
    model_name,
    random_tokens,
    real_prompts,
    real_task,
    task_loss,
    token_loss,
    training_step,
)

Found = tuple[str, list[Case]]
EAGER, FUSED = "eager", "sdpa"
KEPT, LIBRARY = "kept", "the library's defaults"
LAYOUTS = PACKED, EXPANDED = "packed", "expanded"


# Attention


def under_eager_attention(active: bool, step: TrainingStep) -> Action:
    """The step with or without eager attention; the switch takes a millisecond."""

    def act(turn: int) -> None:
        with eager_attention(step.model, active):
            step(turn)

    return act


def attention(options: Namespace, device: torch.device) -> Found:
    """A line for each length and precision."""
    base = base_model(options, device)
    vocabulary = base.config.vocab_size  # type: ignore[union-attr]
    model = adapt(base, OURS, options.rank)
    cases = []
    for length in options.lengths:
        loss = token_loss(random_tokens(vocabulary, options.rows, length, device), "last")
        for precision in options.precisions:
            step = training_step(model, OURS, loss, precision)
            actions = {
                EAGER: under_eager_attention(True, step),
                FUSED: under_eager_attention(False, step),
            }
            lines = {f"{options.rows}×{length} tokens, {precision}": (EAGER, FUSED)}
            cases += compare(actions, lines, options, device)
    return f"BLoB step, eager / fused attention: {model_name(options)}", cases


# Freed memory


def under_allocator(keep: bool, action: Callable[[int], object]) -> Action:
    """The action with freed memory kept or not; the switch takes no time beside a pass."""

    def act(turn: int) -> None:
        keep_freed_memory(keep)
        action(turn)

    return act


def allocator(options: Namespace, device: torch.device) -> Found:
    """A line for the step and one for the draws in each precision.

    Raises:
        RuntimeError: if the C library's allocator takes no such settings.
    """
    if not keep_freed_memory():
        raise RuntimeError("nothing to compare: got another C library, expected glibc; use Linux")
    prompts = real_prompts(options, device, "train")
    models = adapt_all(prompts.model, [OURS, "token"], options.rank)
    # A model's kind of training noise makes no difference to its draws.
    posterior = Gaussian(as_if_trained(models["token"]), prompts.scorer)
    count = options.draws

    def draw(turn: int, precision: str) -> None:
        with autocast(device, precision):
            posterior.logits(prompts.batch(turn), Draws(count))

    cases = []
    for precision in options.precisions:
        step = training_step(models[OURS], OURS, task_loss(prompts), precision)
        works = {"task step": step, f"{count} draws": partial(draw, precision=precision)}
        for name, work in works.items():
            actions = {KEPT: under_allocator(True, work), LIBRARY: under_allocator(False, work)}
            cases += compare(actions, {f"{name}, {precision}": (KEPT, LIBRARY)}, options, device)
    keep_freed_memory(options.allocator == "kept")
    size = f"{model_name(options)}, {options.task}, batch {options.rows}"
    return f"Freed memory kept / {LIBRARY}: {size}", cases


# Text scoring


def text_step(options: Namespace, device: torch.device) -> Found:
    """Training steps and passes of the mean; the title says how far the layouts' logits differ."""
    loaded, task = real_task(options, device)
    prompts = {}
    for name in LAYOUTS:
        scorer = make_scorer(loaded.model, loaded.tokenizer, task, "text", layout=name)
        batches = batches_of(scorer, "train", options, device)
        prompts[name] = Prompts(loaded.model, scorer, batches)
    model = adapt(loaded.model, OURS, options.rank)
    cases = []
    apart = []
    for precision in options.precisions:
        steps = {}
        passes = {}
        for name, one in prompts.items():
            steps[name] = training_step(model, OURS, task_loss(one), precision)
            passes[name] = partial(mean_of, model, one, precision)
        model.train()
        title = f"BLoB training step, packed / expanded, {precision}"
        cases += compare(steps, {title: LAYOUTS}, options, device)
        model.eval()
        title = f"mean's pass, packed / expanded, {precision}"
        cases += compare(passes, {title: LAYOUTS}, options, device)
        gap = max(difference(passes, turn) for turn in range(len(prompts[PACKED].batches)))
        apart.append(f"{gap:.2g} ({precision})")
    lengths = ", ".join(f"{one.mean_length:.0f} ({name})" for name, one in prompts.items())
    what = f"{options.rows} questions, sequences of {lengths} tokens"
    gap = f"the two layouts' logits differ by at most {', '.join(apart)}"
    return f"Text scoring: {model_name(options)}, {options.task}, {what}; {gap}", cases


def mean_of(model: nn.Module, prompts: Prompts, precision: str, turn: int) -> Tensor:
    """Class logits of one turn's batch, without gradients."""
    batch = prompts.batch(turn)
    with torch.inference_mode(), autocast(batch["input_ids"].device, precision):
        return prompts.scorer(model, batch)


def difference(passes: Mapping[str, Callable[[int], Tensor]], turn: int) -> float:
    """How far the two layouts' logits of a batch are apart at most."""
    gap = passes[PACKED](turn) - passes[EXPANDED](turn)
    return gap[gap.isfinite()].abs().max().item()


SECTIONS = {
    "attention": attention,
    "allocator": allocator,
    "text_step": text_step,
}


def parser() -> ArgumentParser:
    """The command's options."""
    made = parser_of(__doc__, repeats=12)
    made.add_argument("section", choices=list(SECTIONS), help="the choice to measure")
    add_model_options(made)
    add_prompt_options(made, rows=4)
    add = made.add_argument
    add("--lengths", type=int, nargs="+", default=[64, 128, 192, 300], help="of attention's rows")
    add("--draws", type=int, default=10, help="of allocator")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and reports."""
    made = parser()
    options = made.parse_args(arguments)
    if options.model is None and options.section != "attention":
        made.error(f"nothing to measure {options.section} on: give --model (and --data_root)")
    run(options.section, options, SECTIONS[options.section])


if __name__ == "__main__":
    main()
