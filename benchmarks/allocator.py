"""A task step and ten held draws with freed memory kept, as bayestune's commands do, over the C library's defaults."""

from collections.abc import Callable, Sequence

from bayestune.forward import Draws
from bayestune.runtime import keep_freed_memory
from draws import as_if_trained
from harness import Action, Case, device_of, environment, interleave, parser_of, report, timed_case
from subjects import (
    PRECISIONS,
    adapt_all,
    add_model_options,
    add_prompt_options,
    autocast,
    real_prompts,
    task_loss,
    training_step,
)

KEPT, STOCK_LIBRARY = "kept", "the library's defaults"


def under(keep: bool, action: Callable[[int], object]) -> Action:
    """The action under one of the two; the switch is timed with it, which is nothing beside a pass."""

    def act(turn: int) -> None:
        keep_freed_memory(keep)
        action(turn)

    return act


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and reports."""
    parser = parser_of(__doc__, repeats=12)
    add_model_options(parser, required=True)
    add_prompt_options(parser, rows=8)
    parser.add_argument("--draws", type=int, default=10, help="how many")
    parser.add_argument(
        "--precisions",
        choices=PRECISIONS,
        nargs="+",
        default=list(PRECISIONS),
        help="each measured",
    )
    options = parser.parse_args(arguments)
    device = device_of(options)
    if not keep_freed_memory():
        parser.error("nothing to compare: this C library's allocator takes no such settings")
    where, prompts = environment(device), real_prompts(options, device, "train")
    # which kind of training noise a model has makes no difference to its draws
    models = adapt_all(prompts.model, ["row", "token"], options.rank)
    posterior = as_if_trained(models["token"], prompts.scorer)
    cases: list[Case] = []
    for precision in options.precisions:
        step = training_step(models["row"], "row", task_loss(prompts), precision)

        def draw(turn: int, precision: str = precision) -> None:
            with autocast(device, precision):
                posterior.logits(prompts.batches[turn % len(prompts.batches)], Draws(options.draws))

        for name, action in (("task step", step), (f"{options.draws} draws", draw)):
            actions = {KEPT: under(True, action), STOCK_LIBRARY: under(False, action)}
            seconds = interleave(actions, options.repeats, warmup=options.warmup, device=device)
            cases.append(timed_case(f"{name}, {precision}", seconds, (KEPT, STOCK_LIBRARY), None))
    keep_freed_memory(options.allocator == "kept")
    title = f"Freed memory kept / {STOCK_LIBRARY}: {options.model}, {options.task}, batch {options.rows}"
    report("allocator", title, cases, options, where)


if __name__ == "__main__":
    main()
