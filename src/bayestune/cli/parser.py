"""The commands, and the parser of them all."""

import shlex
from collections.abc import Callable, Collection, Sequence

from jsonargparse import Namespace

import bayestune
from bayestune.cli import command_options, commands, generating, labelling, publishing, reporting
from bayestune.cli.demo import demo
from bayestune.cli.distilling import distil
from bayestune.cli.harness import run_harness
from bayestune.cli.option_parser import Parser
from bayestune.cli.presets import ConfigOrPreset
from bayestune.cli.service import run_service
from bayestune.cli.slips import asks_for_help, help_text, methods_of_interest
from bayestune.cli.start import COMMANDS as SUMMARIES
from bayestune.cli.words import addressed, gathered
from bayestune.methods import METHODS

BOOLEANS = (bool, bool | None)

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
    "compare": (commands.compare, command_options.add_compare),
    "bench": (commands.bench, command_options.add_bench),
    "table": (commands.table, command_options.add_table),
    "report": (reporting.report, command_options.add_report),
    "demo": (demo, command_options.add_demo),
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
    """The command and its options, as objects; ends the process after help and for slips.

    The options have `command_line` besides, what was typed.
    """
    given = addressed(gathered(given))
    if asks_for_help(given):
        print(help_text(given, make_parser(methods_of_interest(given))))
        raise SystemExit(0)
    parser = make_parser()
    parsed = parser.parse_args(given)
    options = parser.instantiate(parsed)[parsed.command]
    options["command_line"] = shlex.join(["bayestune", *given])
    return parsed.command, options
