"""The table of commands: what each runs, and which options it has; and the parser of them all."""

import shlex
from collections.abc import Callable, Collection, Sequence

from jsonargparse import Namespace

import bayestune
from bayestune.cli import command_options, commands, generating, labelling, publishing, reporting
from bayestune.cli.comparing_methods import compare
from bayestune.cli.demo import demo
from bayestune.cli.distilling import distil
from bayestune.cli.harness import run_harness
from bayestune.cli.option_parser import Parser
from bayestune.cli.presets import ConfigOrPreset
from bayestune.cli.service import run_service
from bayestune.cli.slips import asks_for_help, help_text, methods_of_interest
from bayestune.cli.start import COMMANDS as SUMMARIES
from bayestune.cli.words import repeats_as_list, with_option_names
from bayestune.methods import METHODS

BOOLEANS = (bool, bool | None)

# by name: what runs the command, and what adds its options
COMMANDS: dict[str, tuple[Callable[[Namespace], int | None], Callable[[Parser], None]]] = {
    "fit": (commands.fit, command_options.add_fit),
    "evaluate": (commands.evaluate, command_options.add_evaluate),
    "lm-eval": (run_harness, command_options.add_lm_eval),
    "predict": (commands.predict, command_options.add_predict),
    "generate": (generating.generate_texts, command_options.add_generate),
    "bayesianise": (commands.bayesianise, command_options.add_bayesianise),
    "distil": (distil, command_options.add_distil),
    "export": (publishing.export_adapters, command_options.add_export),
    "card": (publishing.card, command_options.add_card),
    "push": (publishing.push, command_options.add_push),
    "calibrate": (labelling.calibrate, command_options.add_calibrate),
    "rank": (labelling.rank, command_options.add_rank),
    "drift": (labelling.drift, command_options.add_drift),
    "serve": (run_service, command_options.add_serve),
    "compare": (compare, command_options.add_compare),
    "bench": (commands.bench, command_options.add_bench),
    "table": (reporting.table, command_options.add_table),
    "report": (reporting.report, command_options.add_report),
    "demo": (demo, command_options.add_demo),
}


def make_parser(only: Collection[str] = METHODS) -> Parser:
    """The parser of all commands.

    Args:
        only: the methods whose options commands that fit have.
    """
    description = bayestune.__doc__
    parser = Parser(prog="bayestune", description=description, version=bayestune.__version__)
    subcommands = parser.add_subcommands(dest="command")
    for name, (_, add_options) in COMMANDS.items():
        subparser = Parser(prog=f"bayestune {name}", description=SUMMARIES[name])
        subparser.methods = [method for method in METHODS if method in only]
        about = "a file of options, or preset:NAME"
        subparser.add_argument("--config", action=ConfigOrPreset, help=about)
        about = "no progress bars, no notes; warnings and results only"
        subparser.option("quiet", bool, False, about)
        add_options(subparser)
        for action in subparser._actions:
            if getattr(action, "_typehint", None) in BOOLEANS:
                action.nargs = "?"  # `--resume` stands for `--resume true`
                action.const = True
        subcommands.add_subcommand(name, subparser, help=SUMMARIES[name])
    return parser


def parse(arguments: Sequence[str]) -> tuple[str, Namespace]:
    """Parses a command line; ends the process after help, and for what does not parse.

    Args:
        arguments: what was typed after `bayestune`.

    Returns:
        The command's name, and its options as objects; `command_line` among them is what was typed.
    """
    arguments = with_option_names(repeats_as_list(arguments))
    if asks_for_help(arguments):
        print(help_text(arguments, make_parser(methods_of_interest(arguments))))
        raise SystemExit(0)
    parser = make_parser()
    parsed = parser.parse_args(arguments)
    args = parser.instantiate(parsed)[parsed.command]
    args["command_line"] = shlex.join(["bayestune", *arguments])
    return parsed.command, args
