"""The commands' options, derived from the constructors."""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

import bayestune
from bayestune.bench import Grid, Launcher, run_bench
from bayestune.cli.commands import (
    Part,
    run_bayesianise,
    run_compare,
    run_evaluate,
    run_fit,
    run_predict,
    run_table,
)
from bayestune.cli.presets import ConfigOrPreset
from bayestune.evaluation import Adaptive, EvaluationOptions
from bayestune.methods import METHODS, MLE, TFB, Method
from bayestune.report import Style
from bayestune.runtime import keep_freed_memory
from bayestune.session import Dtype, TaskOptions
from bayestune.training import Interrupted, Training

EXIT_INTERRUPTED = 130
MODEL_HELP = "directory, Hub id, .gguf file or pypi:<distribution>==<version>; left out: SmolLM2-135M-Instruct"


def _parser(name: str, description: str | None) -> ArgumentParser:
    parser = ArgumentParser(prog=f"bayestune {name}", description=description)
    parser.add_argument(
        "--config",
        action=ConfigOrPreset,
        help="a YAML or JSON file of these options, or preset:NAME",
    )
    return parser


def _flags(parser: ArgumentParser) -> ArgumentParser:
    """Lets `--resume` stand for `--resume true`, as for all booleans."""
    for action in parser._actions:
        if action.default is True or action.default is False:
            action.nargs, action.const = "?", True
    return parser


def _fitting(parser: ArgumentParser) -> None:
    parser.add_argument("--model", type=str | None, default=None, help=MODEL_HELP)
    parser.add_argument(
        "--dtype", type=Dtype, default="float32", help="of the base model's weights"
    )
    parser.add_argument(
        "--base",
        type=str | None,
        default=None,
        help="what a post-hoc method builds on, its own if not",
    )
    parser.add_class_arguments(TaskOptions)
    parser.add_class_arguments(Training, skip={"output"})
    for name, method in METHODS.items():
        if any(field.name != "base" for field in fields(method)):  # type: ignore[arg-type]
            parser.add_class_arguments(method, name, skip={"base"})
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for everything the run writes"
    )
    parser.add_argument("--overwrite", type=bool, default=False, help="empty the output folder")


def _reading(parser: ArgumentParser) -> None:
    parser.add_argument("--posterior", type=Path, required=True, help="a folder of `fit`")
    parser.add_argument(
        "--model", type=str | None, default=None, help="the base model, where it has moved"
    )
    parser.add_argument("--bf16", type=bool, default=False, help="bfloat16 autocast")


def _built(cls: type, options: Namespace, **more: Any) -> Any:
    names = {field.name for field in fields(cls)} - set(more)
    return cls(**{name: options[name] for name in names if name in options}, **more)


def _method(name: str, options: Namespace) -> Method:
    method, base = _plain_method(name, options), options.get("base")
    return (
        replace(method, base=_plain_method(base, options))
        if base and hasattr(method, "base")
        else method
    )  # type: ignore[type-var]


def _plain_method(name: str, options: Namespace) -> Method:
    if name not in METHODS:
        raise ValueError(f"unknown method: got {name!r}, expected one of {sorted(METHODS)}")
    return options[name] if name in options else METHODS[name]()


def _fit_parser() -> ArgumentParser:
    parser = _parser("fit", "Fit one method and save its posterior.")
    parser.add_argument("--method", type=str, default="blob", help=f"one of {', '.join(METHODS)}")
    _fitting(parser)
    return parser


def _fit(o: Namespace) -> None:
    questions, training = _built(TaskOptions, o), _built(Training, o, output=None)
    run_fit(
        o.model,
        _method(o.method, o),
        questions,
        training,
        o.output,
        overwrite=o.overwrite,
        dtype=o.dtype,
    )


def _evaluate_parser() -> ArgumentParser:
    parser = _parser("evaluate", "Accuracy and calibration of a posterior on labelled questions.")
    _reading(parser)
    parser.add_class_arguments(
        TaskOptions, skip={"data", "scoring", "max_length", "holdout", "train_rows"}
    )
    parser.add_class_arguments(EvaluationOptions)
    parser.add_argument(
        "--output",
        type=Path | None,
        default=None,
        help="folder of the records; left out: the posterior's",
    )
    return parser


def _evaluate(o: Namespace) -> None:
    run_evaluate(
        o.posterior,
        o.model,
        _built(TaskOptions, o),
        _built(EvaluationOptions, o),
        o.output,
        bf16=o.bf16,
    )


def _predict_parser() -> ArgumentParser:
    parser = _parser(
        "predict", "Probabilities and uncertainty for your own rows: JSON lines in, JSON lines out."
    )
    _reading(parser)
    parser.add_argument(
        "--input", type=Path, required=True, help="JSONL or CSV: question, options, perhaps answer"
    )
    parser.add_argument(
        "--options", type=list[str], default=[], help="the options of rows that have none"
    )
    parser.add_argument("--draws", type=int, default=10, help="posterior draws; 0 for the mean")
    parser.add_argument("--draw_seed", type=int, default=0, help="of the held draws")
    parser.add_argument(
        "--shared_prefix",
        type=int | None,
        default=None,
        help="approximate: draw only the last tokens of a prompt",
    )
    parser.add_class_arguments(Adaptive, skip={"most"})
    parser.add_argument(
        "--output", type=Path | None, default=None, help="a file; left out: standard output"
    )
    parser.add_argument("--overwrite", type=bool, default=False, help="replace the output file")
    return parser


def _predict(o: Namespace) -> None:
    rules = o.decided or o.standard_error is not None  # only these ask for rounds
    adaptive = _built(Adaptive, o, most=o.draws) if rules else None
    how = {name: o[name] for name in ("bf16", "overwrite", "shared_prefix")}
    run_predict(
        o.posterior,
        o.model,
        o.input,
        o.options,
        o.draws,
        o.draw_seed,
        o.output,
        adaptive=adaptive,
        **how,
    )


def _bayesianise_parser() -> ArgumentParser:
    parser = _parser("bayesianise", "A posterior around any LoRA adapter, without training (TFB).")
    parser.add_argument("adapter", type=Path, help="a LoRA adapter folder, as PEFT saves it")
    parser.add_argument(
        "--anchor",
        type=Path,
        required=True,
        help="JSONL or CSV rows with answers, best from training",
    )
    parser.add_argument(
        "--model", type=str | None, default=None, help="the base model, where not the adapter's own"
    )
    parser.add_argument(
        "--dtype", type=Dtype, default="float32", help="of the base model's weights"
    )
    parser.add_argument("--bf16", type=bool, default=False, help="bfloat16 autocast")
    own: set[str | int] = {
        "data",
        "evaluation_data",
        "data_root",
        "holdout",
        "train_rows",
        "evaluation_rows",
        "subset_seed",
    }
    parser.add_class_arguments(TaskOptions, skip=own)
    parser.add_class_arguments(TFB, skip={"base"})
    parser.add_argument("--output", type=Path, required=True, help="folder of the posterior")
    parser.add_argument("--overwrite", type=bool, default=False, help="empty the output folder")
    return parser


def _bayesianise(o: Namespace) -> None:
    method, questions = _built(TFB, o, base=MLE()), _built(TaskOptions, o)
    how = {name: o[name] for name in ("overwrite", "bf16", "dtype")}
    run_bayesianise(o.adapter, o.model, o.anchor, method, questions, o.output, **how)


def _compare_parser() -> ArgumentParser:
    parser = _parser(
        "compare", "Fit and evaluate several methods on one task: table, picture, page."
    )
    parser.add_argument(
        "--methods", type=list[str], default=["mle", "blob"], help=f"among {', '.join(METHODS)}"
    )
    parser.add_argument("--on", type=Part, default="evaluation", help="the rows to evaluate on")
    _fitting(parser)
    parser.add_class_arguments(EvaluationOptions)
    return parser


def _compare(o: Namespace) -> None:
    run_compare(
        o.model,
        {name: _method(name, o) for name in o.methods},
        _built(TaskOptions, o),
        _built(Training, o, output=None),
        _built(EvaluationOptions, o),
        o.output,
        overwrite=o.overwrite,
        on=o.on,
        dtype=o.dtype,
    )


def _bench_parser() -> ArgumentParser:
    parser = _parser(
        "bench",
        "Fit and evaluate a grid of models, tasks, methods and seeds; goes on where it stopped.",
    )
    parser.add_class_arguments(Grid)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument(
        "--launcher", type=Launcher, default="local", help="this process, or a Ray cluster"
    )
    parser.add_argument(
        "--only_tasks", type=list[str], default=[], help="run the cells of these tasks only"
    )
    parser.add_argument(
        "--only_methods", type=list[str], default=[], help="run the cells of these methods only"
    )
    parser.add_argument(
        "--discard_fits", type=bool, default=False, help="remove the saved posteriors at the end"
    )
    return parser


def _bench(o: Namespace) -> int:
    how = {name: o[name] for name in ("launcher", "only_tasks", "only_methods", "discard_fits")}
    return run_bench(_built(Grid, o), o.output, **how)


def _table_parser() -> ArgumentParser:
    parser = _parser(
        "table",
        "The table of a results folder: methods × tasks, mean ± std over seeds, significance.",
    )
    parser.add_argument("results", type=Path, help="folder of `bench` or `compare`")
    parser.add_argument(
        "--style", type=Style, default="text", help="for a terminal, a page or a paper (booktabs)"
    )
    parser.add_argument(
        "--resamples", type=int, default=1000, help="of the paired bootstrap; 0 for no p-values"
    )
    parser.add_argument(
        "--against", type=str | None, default=None, help='compare with this method, as "BLoB N=10"'
    )
    parser.add_argument(
        "--output", type=Path | None, default=None, help="a file; left out: standard output"
    )
    return parser


def _table(o: Namespace) -> None:
    run_table(o.results, o.style, o.output, resamples=o.resamples, against=o.against)


def _demo_parser() -> ArgumentParser:
    parser = _parser(
        "demo", "MLE and BLoB on the embedded questions in a few minutes, with a report."
    )
    parser.add_argument("--model", type=str | None, default=None, help=MODEL_HELP)
    parser.add_argument(
        "--output", type=Path, default=Path("runs/demo"), help="folder of the report"
    )
    parser.add_argument("--overwrite", type=bool, default=False, help="empty the output folder")
    return parser


def _demo(o: Namespace) -> None:
    from bayestune.cli.demo import run_demo

    run_demo(o.model, o.output, overwrite=o.overwrite)


COMMANDS: dict[str, tuple[Callable[[], ArgumentParser], Callable[[Namespace], int | None], str]] = {
    "fit": (_fit_parser, _fit, "fit one method and save its posterior"),
    "evaluate": (_evaluate_parser, _evaluate, "accuracy and calibration of a posterior"),
    "predict": (_predict_parser, _predict, "probabilities and uncertainty for your rows"),
    "bayesianise": (
        _bayesianise_parser,
        _bayesianise,
        "a posterior around any LoRA adapter, without training",
    ),
    "compare": (_compare_parser, _compare, "several methods on one task, with a report"),
    "bench": (_bench_parser, _bench, "a grid of models, tasks, methods and seeds"),
    "table": (_table_parser, _table, "the table of a results folder"),
    "demo": (_demo_parser, _demo, "MLE and BLoB on the embedded questions"),
}


def make_parser() -> ArgumentParser:
    """The parser of all commands."""
    parser = ArgumentParser(
        prog="bayestune", description=bayestune.__doc__, version=bayestune.__version__
    )
    subcommands = parser.add_subcommands(dest="command")
    for name, (make, _, summary) in COMMANDS.items():
        subcommands.add_subcommand(name, _flags(make()), help=summary)
    return parser


def _with_config(arguments: list[str]) -> list[str]:
    """Lets `bench FILE` stand for `bench --config FILE`."""
    named = arguments[:1] == ["bench"] and len(arguments) > 1 and not arguments[1].startswith("-")
    return ["bench", "--config", *arguments[1:]] if named else arguments


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; the exit code is 0, 1 if cells of a grid failed, 2 for bad input, 130 after ctrl-C."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    keep_freed_memory()
    logging.basicConfig(format="bayestune: %(message)s", level=logging.WARNING)
    logging.getLogger("bayestune").setLevel(logging.INFO)
    parser = make_parser()
    parsed = parser.parse_args(_with_config(list(sys.argv[1:] if arguments is None else arguments)))
    options = parser.instantiate(parsed)
    try:
        return COMMANDS[parsed.command][1](options[parsed.command]) or 0
    except Interrupted as error:
        print(f"bayestune: {error}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        print("bayestune: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (ValueError, OSError, ArithmeticError, ImportError) as error:
        print(f"bayestune: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
