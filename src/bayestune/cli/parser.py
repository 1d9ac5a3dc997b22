"""The commands' options, derived from the constructors."""

import shutil
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

import bayestune
from bayestune.bench import Grid, Launcher
from bayestune.cli import commands, labelling
from bayestune.cli.demo import demo
from bayestune.cli.presets import ConfigOrPreset
from bayestune.cli.service import run_service
from bayestune.cli.slips import asks_for_help, help_text, methods_of_interest, one_line
from bayestune.cli.start import COMMANDS as SUMMARIES
from bayestune.cli.start import EXIT_BAD_INPUT
from bayestune.cli.words import gathered, read_options_as_words, spelled_out
from bayestune.data import AnswerIs, Part
from bayestune.decisions import Acquisition, SetKind
from bayestune.evaluation import EvaluationOptions
from bayestune.methods import METHODS, TFB
from bayestune.report import Style
from bayestune.serving import Limits, Serving
from bayestune.session import OF_THE_FIT, Compared, Dtype, Put, TaskOptions
from bayestune.training import Training

BOOLEANS = (bool, bool | None)
_KINDS = "directory, Hub id, .gguf file or pypi:<distribution>==<version>"
MODEL_HELP = f"{_KINDS}; left out: SmolLM2-135M-Instruct"
ARTEFACT_HELP = "a folder of `fit`, or a LoRA adapter as PEFT saves it"
OVERWRITE_HELP = "replace the run in the output folder once the new one is whole"
UNCALIBRATED_HELP = "leave the posterior's calibration aside"
METHOD_HELP = ", ".join(METHODS)


class HelpFormatter(DefaultHelpFormatter):
    """Help in wide lines."""

    def __init__(self, prog: str) -> None:
        width = max(shutil.get_terminal_size((100, 24)).columns, 100)
        super().__init__(prog, max_help_position=32, width=width)


class Parser(ArgumentParser):
    """A parser whose options take a line each, and whose errors do too."""

    methods: Collection[str] = ()  # whose options a command that fits has

    def __init__(self, **given: Any) -> None:
        # an abbreviation would be an option that was not meant
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **given)

    def parse_args(self, args: Any = None, *more: Any, **given: Any) -> Any:
        """Parses arguments in which options of rows are words."""
        read_options_as_words()
        return super().parse_args(
            spelled_out(sys.argv[1:] if args is None else args), *more, **given
        )

    def option(self, name: str, kind: Any, default: Any, text: str) -> None:
        """Adds an option that may be left out."""
        self.add_argument(f"--{name}", type=kind, default=default, help=text)

    def needed(self, name: str, text: str) -> None:
        """Adds an option that is a path and must be given."""
        self.add_argument(f"--{name}", type=Path, required=True, help=text)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Says in a line what does not parse, and ends the process with 2."""
        named: Any = getattr(ex, "subcommand_parser", None) or self
        print(f"bayestune: error: {one_line(message, named)}", file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT)


def _add_fit(parser: Parser) -> None:
    parser.option("method", str, "blob", f"one of {METHOD_HELP}")
    _add_fitting(parser)


def _add_compare(parser: Parser) -> None:
    parser.option("methods", list[str], ["mle", "blob"], f"among {METHOD_HELP}")
    parser.option("on", Part, "evaluation", "the rows to evaluate on")
    _add_fitting(parser)
    parser.add_class_arguments(EvaluationOptions)


def _add_fitting(parser: Parser) -> None:
    parser.option("model", str | None, None, MODEL_HELP)
    parser.option("dtype", Dtype, "float32", "of the base model's weights")
    parser.option("base", str | None, None, "what a post-hoc method builds on, its own if not")
    parser.add_class_arguments(TaskOptions)
    parser.add_class_arguments(Training, skip={"output"})
    for name in parser.methods:
        method = METHODS[name]
        if any(field.name != "base" for field in fields(method)):  # type: ignore[arg-type]
            parser.add_class_arguments(method, name, skip={"base"})
    parser.needed("output", "folder for everything the run writes")
    parser.option("overwrite", bool, False, OVERWRITE_HELP)


def _add_evaluate(parser: Parser) -> None:
    _add_reading(parser)
    parser.add_class_arguments(TaskOptions, skip=set(OF_THE_FIT))
    parser.add_class_arguments(EvaluationOptions)
    parser.option("output", Path | None, None, "folder of the records; left out: the posterior's")
    about = "such as 'nll<=0.7' or 'wrong_at_0.9<=2', perhaps several times: else exit code 1"
    parser.option("gate", list[str], [], about)
    parser.option("uncalibrated", bool, False, UNCALIBRATED_HELP)


def _add_predict(parser: Parser) -> None:
    _add_reading(parser)
    parser.needed("input", "JSONL or CSV: question, options, perhaps answer; - for standard input")
    parser.option("options", list[str], [], "the options of rows that have none")
    parser.option("answer_is", AnswerIs | None, None, "of answers: index, letter or text")
    parser.option("draws", int | None, None, "0 for the mean; left out: as calibrated, or else 10")
    parser.option("draw_seed", int | None, None, "of the draws; left out: as calibrated, or else 0")
    parser.option("shared_prefix", int | None, None, "approximate: draw a prompt's end only")
    parser.option("decided", bool, False, "draw no more for rows that no draw can decide otherwise")
    parser.option("uncalibrated", bool, False, UNCALIBRATED_HELP)
    parser.option("output", Path | None, None, "a file; left out: standard output")
    parser.option("resume", bool, False, "go on after the output file's last whole line")
    parser.option("overwrite", bool, False, "replace the output file once the new one is whole")


def _add_reading(parser: Parser) -> None:
    parser.needed("posterior", "a folder of `fit`")
    parser.option("model", str | None, None, "the base model, where it has moved")
    parser.option("bf16", bool | None, None, "bfloat16 autocast; left out: as fitted")


def _add_bayesianise(parser: Parser) -> None:
    parser.add_argument("adapter", type=Path, help="a LoRA adapter folder, as PEFT saves it")
    parser.needed("anchor", "JSONL or CSV rows with answers, best from training")
    parser.option("model", str | None, None, "the base model, where not the adapter's own")
    parser.option("dtype", Dtype, "float32", "of the base model's weights")
    parser.option("bf16", bool, False, "bfloat16 autocast")
    put = ("task", "options", "scoring", "max_length", "answer_is")
    others = [field.name for field in fields(TaskOptions) if field.name not in put]
    parser.add_class_arguments(TaskOptions, skip={*others})
    parser.add_class_arguments(TFB, skip={"base"})
    parser.needed("output", "folder of the posterior")
    parser.option("overwrite", bool, False, OVERWRITE_HELP)


def _add_calibrate(parser: Parser) -> None:
    parser.add_argument("posterior", type=Path, help=ARTEFACT_HELP)
    parser.needed("rows", "JSONL or CSV rows with answers that training did not see")
    parser.option("risk", float, 0.05, "largest error rate among the rows acted on")
    parser.option("confidence", float, 0.9, "that the promise holds")
    parser.option("set_coverage", float, 0.9, "of the sets: how often the right option is in")
    parser.option("set_kind", SetKind, "lac", "the sets that predictions carry")
    parser.option("bands", dict[str, float], {}, "such as '{act: 0.05, flag: 0.2}', beyond: ask")
    parser.option("per_class", bool, False, "a threshold for each class by itself")
    parser.option("costs", list[list[float]], [], "of errors: a row of costs for each right answer")
    parser.option("model", str | None, None, "the base model, where it has moved")
    parser.add_class_arguments(Compared)
    parser.add_class_arguments(Put)


def _add_rank(parser: Parser) -> None:
    parser.add_argument("posterior", type=Path, help=ARTEFACT_HELP)
    parser.needed("rows", "JSONL or CSV rows, perhaps without answers")
    parser.option("number", int | None, None, "how many rows to take; left out: all")
    parser.option("by", Acquisition | None, None, "the rule; left out: bald, of one draw entropy")
    parser.option("draws", int, 10, "posterior draws; 0 for the mean")
    parser.option("draw_seed", int, 0, 'of the draws, and of "random"')
    parser.option("output", Path | None, None, "a file; left out: standard output")
    parser.option("overwrite", bool, False, "replace the output file")
    parser.option("model", str | None, None, "the base model, where it has moved")
    parser.option("bf16", bool | None, None, "bfloat16 autocast; left out: as fitted")
    parser.add_class_arguments(Put, skip={"answer_is", "unsure", "trained_on"})


def _add_drift(parser: Parser) -> None:
    parser.add_argument("posterior", type=Path, help="a calibrated posterior or adapter")
    parser.needed("rows", "JSONL or CSV rows, perhaps without answers")
    parser.option("level", float, 0.05, "of the test: how often rows like the held-out ones alarm")
    parser.option("scores", list[str], [], "to compare; left out: a few of those that are kept")
    parser.option("output", Path | None, None, "a file for the figures; left out: none")
    parser.option("overwrite", bool, False, "replace the output file")
    parser.option("model", str | None, None, "the base model, where it has moved")


def _add_serve(parser: Parser) -> None:
    about = f"each {ARTEFACT_HELP}, calibrated; the first one is the default"
    parser.add_argument("posteriors", type=Path, nargs="+", help=about)
    parser.option("model", str | None, None, "the base model, where it has moved")
    parser.add_class_arguments(Serving)
    parser.add_class_arguments(Limits)


def _add_bench(parser: Parser) -> None:
    parser.add_class_arguments(Grid)
    parser.needed("output", "folder of the results")
    parser.option("launcher", Launcher, "local", "this process, or a Ray cluster")
    parser.option("only_tasks", list[str], [], "run the cells of these tasks only")
    parser.option("only_methods", list[str], [], "run the cells of these methods only")
    parser.option("discard_fits", bool, False, "remove the saved posteriors at the end")


def _add_table(parser: Parser) -> None:
    parser.add_argument("results", type=Path, help="folder of `bench` or `compare`")
    parser.option("style", Style, "text", "for a terminal, a page or a paper (booktabs)")
    parser.option("resamples", int, 1000, "of the paired bootstrap; 0 for no p-values")
    parser.option("against", str | None, None, 'compare with this method, as "BLoB N=10"')
    parser.option("output", Path | None, None, "a file; left out: standard output")


def _add_demo(parser: Parser) -> None:
    parser.option("model", str | None, None, MODEL_HELP)
    parser.option("output", Path, Path("runs/demo"), "folder of the report")
    parser.option("overwrite", bool, False, OVERWRITE_HELP)


COMMANDS: dict[str, tuple[Callable[[Namespace], int | None], Callable[[Parser], None]]] = {
    "fit": (commands.fit, _add_fit),
    "evaluate": (commands.evaluate, _add_evaluate),
    "predict": (commands.predict, _add_predict),
    "bayesianise": (commands.bayesianise, _add_bayesianise),
    "calibrate": (labelling.calibrate, _add_calibrate),
    "rank": (labelling.rank, _add_rank),
    "drift": (labelling.drift, _add_drift),
    "serve": (run_service, _add_serve),
    "compare": (commands.compare, _add_compare),
    "bench": (commands.bench, _add_bench),
    "table": (commands.table, _add_table),
    "demo": (demo, _add_demo),
}


def make_parser(only: Collection[str] = METHODS) -> Parser:
    """The parser of all commands, with the options of some methods."""
    about = bayestune.__doc__
    parser = Parser(prog="bayestune", description=about, version=bayestune.__version__)
    subcommands = parser.add_subcommands(dest="command")
    for name, (_, add_options) in COMMANDS.items():
        own = Parser(prog=f"bayestune {name}", description=SUMMARIES[name])
        own.methods = [method for method in METHODS if method in only]
        about = "a file of options, or preset:NAME"
        own.add_argument("--config", action=ConfigOrPreset, help=about)
        own.option("quiet", bool, False, "no progress bars, no notes; warnings and results only")
        add_options(own)
        for action in own._actions:
            if getattr(action, "_typehint", None) in BOOLEANS:
                action.nargs = "?"  # `--resume` stands for `--resume true`
                action.const = True
        subcommands.add_subcommand(name, own, help=SUMMARIES[name])
    return parser


def parse(given: Sequence[str]) -> tuple[str, Namespace]:
    """The command and its options, as objects; ends the process after help and for slips."""
    given = gathered(given)
    if given[:1] == ["bench"] and len(given) > 1 and not given[1].startswith("-"):
        given.insert(1, "--config")
    if asks_for_help(given):
        print(help_text(given, make_parser(methods_of_interest(given))))
        raise SystemExit(0)
    parser = make_parser()
    parsed = parser.parse_args(given)
    return parsed.command, parser.instantiate(parsed)[parsed.command]
