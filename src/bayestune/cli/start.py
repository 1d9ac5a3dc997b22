"""Where every command begins: its overview and version, and refuses unknown commands at once.

These need no torch. `guard`, which runs a command, does, so it is imported by name, once there is
work to do.
"""

import importlib
import sys
from collections.abc import Sequence
from textwrap import fill

import bayestune
from bayestune.errors import nearest

COMMANDS = {
    "fit": "Fit one method and save its posterior.",
    "evaluate": "Accuracy and calibration of a posterior on labelled questions.",
    "lm-eval": "Tasks of lm-evaluation-harness, options averaged over the draws; extra `lm-eval`.",
    "predict": "Probabilities and uncertainty for your own rows: JSON lines in, JSON lines out.",
    "generate": "Texts under the draws, with each token's uncertainty: JSON lines in and out.",
    "bayesianise": "A posterior around any LoRA adapter, without training (TFB).",
    "distil": "A student of a posterior: one plain LoRA adapter that answers as its draws do.",
    "export": "Mean, student and draws as plain LoRA adapters with a manifest, for LoRA servers.",
    "card": "A model card from a posterior's folder and its records.",
    "push": "Upload a posterior to the Hub: both halves, its calibration, its card.",
    "calibrate": "On held-out rows: how to predict, and when to act; kept beside the posterior.",
    "rank": "Which unlabelled rows to label next: JSON lines in, ranked JSON lines out.",
    "drift": "Are new rows like the held-out ones of the calibration?",
    "serve": "Decisions over HTTP, and a page to ask on: posteriors on one base; extra `serve`.",
    "compare": "Fit and evaluate several methods on one task: table, picture, page.",
    "bench": "Fit and evaluate a grid of models, tasks, methods and seeds; goes on where it "
    "stopped.",
    "table": "The table of a results folder: methods × tasks, mean ± std over seeds, significance.",
    "report": "One page of any number of runs, complete in itself: figures, charts, rows.",
    "demo": "MLE and BLoB on the embedded questions in a few minutes, with a report.",
}
EXIT_BAD_INPUT = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: its name and its options, as they are typed; None for those of the process.

    Returns:
        0; 1 if cells of a grid failed, a gate is not passed or rows drift; 2 for bad input, a full
        disk or memory that ran out; 70 for what should not happen; 130 after ctrl-C; 143 after
        SIGTERM.
    """
    if arguments is None:
        arguments = sys.argv[1:]
    typed = [str(argument) for argument in arguments]
    command = typed[0] if typed else ""
    for stream in (sys.stdout, sys.stderr):
        # a row's text may have any character, whatever the terminal's encoding
        getattr(stream, "reconfigure", _nothing)(encoding="utf-8", errors="backslashreplace")
    if command in ("--version", "-V"):
        print(f"bayestune {bayestune.__version__}")
        return 0
    if command in ("", "-h", "--help", "help"):
        print(overview())
        return 0 if command else EXIT_BAD_INPUT
    if command not in COMMANDS:
        print(f"bayestune: error: {_unknown_command(command)}", file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT)
    return importlib.import_module("bayestune.cli.guard").run_guarded(typed)


def _nothing(**_: object) -> None:
    """Stands for `reconfigure` of a stream that has none."""


def overview() -> str:
    """The text of `bayestune --help`."""
    lines = ["usage: bayestune COMMAND [--OPTION VALUE …]", "", bayestune.__doc__ or "", ""]
    for name, summary in COMMANDS.items():
        indent = {"initial_indent": f"  {name:<13}", "subsequent_indent": " " * 15}
        lines.append(fill(summary, 88, **indent))  # type: ignore[arg-type]
    lines += ["", "options of a command: bayestune COMMAND --help; of one method among them:"]
    lines += ["bayestune fit --method NAME --help; the version: bayestune --version"]
    return "\n".join(lines)


def _unknown_command(word: str) -> str:
    """What to say of a first word that is no command."""
    if word.startswith("-"):
        return f"got {word} before a command, expected one of {', '.join(COMMANDS)} first"
    near = nearest(word, COMMANDS)
    hint = f"; did you mean {near}?" if near else ""
    return f"unknown command: got {word!r}, expected one of {', '.join(COMMANDS)}{hint}"
