"""The options of each command: fields of the dataclasses it builds, and what it takes besides.

`add_COMMAND` adds all options of a command, the other functions some that several commands share.
"""

from dataclasses import fields
from pathlib import Path

from bayestune.bench import Grid, Launcher
from bayestune.cli.option_parser import Parser
from bayestune.data import AnswerIs, Part
from bayestune.decisions import Acquisition, SetKind
from bayestune.evaluation import EvaluationOptions
from bayestune.generation import DrawsAs
from bayestune.methods import METHODS, TFB, Distilled
from bayestune.report import Style
from bayestune.serving import Limits, ServiceOptions
from bayestune.session import (
    SETTLED_BY_FIT,
    DistillationRows,
    Dtype,
    RowOptions,
    TaskOptions,
    VariantOptions,
)
from bayestune.sharing import ExportOptions
from bayestune.training import Training

_KINDS = "directory, Hub id, .gguf file or pypi:<distribution>==<version>"
MODEL_HELP = f"{_KINDS}; left out: SmolLM2-135M-Instruct"
ARTEFACT_HELP = "a folder of `fit`, or a LoRA adapter as PEFT saves it"
OVERWRITE_HELP = "replace the run in the output folder once the new one is whole"
UNCALIBRATED_HELP = "leave the posterior's calibration aside"
COLUMNS_HELP = "the file's own names, as question=subject,answer=queue; left out: as in the fit"
BASE_HELP = "the base model, where it has moved"
BF16_HELP = "bfloat16 autocast; left out: as fitted"
DTYPE_HELP = "of the base model's weights; 4bit (QLoRA) and 8bit need bitsandbytes"
METHOD_HELP = ", ".join(METHODS)


def add_fit(parser: Parser) -> None:
    """Options of `fit`."""
    parser.option("method", str, "blob", f"one of {METHOD_HELP}")
    add_fitting(parser)


def add_compare(parser: Parser) -> None:
    """Options of `compare`."""
    parser.option("methods", list[str], ["mle", "blob"], f"among {METHOD_HELP}")
    parser.option("on", Part, "evaluation", "the rows to evaluate on")
    add_fitting(parser)
    parser.add_class_arguments(EvaluationOptions)


def add_fitting(parser: Parser) -> None:
    """Options of commands that fit: the model, the task, the training, each method's."""
    parser.option("model", str | None, None, MODEL_HELP)
    parser.option("dtype", Dtype, "float32", DTYPE_HELP)
    about = "the method that another builds on, as --method tfb --base map; left out: its own"
    parser.option("base", str | None, None, about)
    parser.add_class_arguments(TaskOptions)
    parser.add_class_arguments(Training, skip={"output"})
    for name in parser.methods:
        method = METHODS[name]
        if any(field.name != "base" for field in fields(method)):  # type: ignore[arg-type]
            parser.add_class_arguments(method, name, skip={"base"})
    parser.required_path("output", "folder for everything the run writes")
    parser.option("overwrite", bool, False, OVERWRITE_HELP)


def add_evaluate(parser: Parser) -> None:
    """Options of `evaluate`."""
    add_posterior(parser)
    parser.add_class_arguments(TaskOptions, skip=set(SETTLED_BY_FIT))
    parser.add_class_arguments(EvaluationOptions)
    parser.option("output", Path | None, None, "folder of the records; left out: the posterior's")
    about = "a bar such as 'nll<=0.7', once or more; exit code 1 if one does not hold"
    parser.option("gate", list[str], [], about)
    parser.option("uncalibrated", bool, False, UNCALIBRATED_HELP)


def add_lm_eval(parser: Parser) -> None:
    """Options of `lm-eval`."""
    add_posterior(parser)
    about = "names of tasks, groups or tags, or YAML files: arc_easy,piqa"
    parser.add_argument("--tasks", type=str, required=True, help=about)
    parser.option("include_path", Path | None, None, "a folder with tasks of your own")
    parser.option(
        "num_fewshot", int | None, None, "examples before a question; left out: as the task says"
    )
    parser.option("limit", int | None, None, "at most so many documents of each task")
    parser.option("apply_chat_template", bool, False, "put the tasks as chats")
    parser.option("draws", int, 10, "posterior draws; 0 for the mean")
    parser.option("draw_seed", int, 0, "of the draws")
    parser.option("batch_size", int, 8, "requests of a pass")
    parser.option("use_cache", Path | None, None, "folder of likelihoods that were read before")
    about = "folder of the records; left out: the posterior's"
    parser.option("output", Path | None, None, about)


def add_predict(parser: Parser) -> None:
    """Options of `predict`."""
    add_posterior(parser)
    parser.required_path("input", "or --rows: JSONL, CSV or parquet rows; - for standard input")
    parser.option("options", list[str], [], "the options of rows that have none")
    parser.option("answer_is", AnswerIs | None, None, "of answers: index, letter or text")
    parser.option("columns", dict[str, str], {}, COLUMNS_HELP)
    parser.option("draws", int | None, None, "0 for the mean; left out: as calibrated, or else 10")
    parser.option("draw_seed", int | None, None, "of the draws; left out: as calibrated, or else 0")
    about = "an approximation: draws read so many tokens at a prompt's end, the mean the others"
    parser.option("shared_prefix", int | None, None, about)
    about = "draw no more for rows whose choice no further draw can change"
    parser.option("decided", bool, False, about)
    parser.option("uncalibrated", bool, False, UNCALIBRATED_HELP)
    parser.option("output", Path | None, None, "a file; left out: standard output")
    parser.option("resume", bool, False, "go on after the output file's last whole line")
    parser.option("overwrite", bool, False, "replace the output file once the new one is whole")


def add_generate(parser: Parser) -> None:
    """Options of `generate`."""
    add_posterior(parser)
    about = "or --rows: JSON lines: a text in prompt, or messages; - reads a pipe"
    parser.required_path("input", about)
    parser.option("draws", int, 10, "posterior draws; 0 for the mean")
    parser.option("draw_seed", int, 0, "of the draws")
    about = "average: one text, of tokens averaged over draws; sequences: a text of each draw"
    parser.option("draws_as", DrawsAs, "average", about)
    parser.option("max_new_tokens", int, 64, "the most tokens of a text")
    parser.option("do_sample", bool, False, "sample; left out: take the most probable token")
    parser.option("temperature", float | None, None, "of sampling")
    parser.option("top_p", float | None, None, "of sampling")
    parser.option("top_k", int | None, None, "of sampling")
    parser.option("seed", int, 0, "of sampling")
    parser.option("stop", list[str], [], "words behind which a text ends")
    parser.option("batch_size", int, 4, "prompts at once, each with all draws")
    parser.option("output", Path | None, None, "a file; left out: standard output")
    parser.option("overwrite", bool, False, "replace the output file")


def add_posterior(parser: Parser) -> None:
    """Options of commands that load a posterior."""
    parser.required_path("posterior", "a folder of `fit`; as the first word without --posterior")
    parser.option("model", str | None, None, BASE_HELP)
    parser.option("bf16", bool | None, None, BF16_HELP)


def add_bayesianise(parser: Parser) -> None:
    """Options of `bayesianise`."""
    parser.add_argument("adapter", type=Path, help="a LoRA adapter folder, as PEFT saves it")
    parser.required_path("anchor", "JSONL, CSV or parquet rows with answers, best from training")
    parser.option("model", str | None, None, "the base model, where not the adapter's own")
    parser.option("dtype", Dtype, "float32", DTYPE_HELP)
    parser.option("bf16", bool, False, "bfloat16 autocast")
    taken = ("task", "options", "scoring", "max_length", "answer_is")
    taken += ("columns", "prompt", "chat", "system")
    others = {field.name for field in fields(TaskOptions)} - set(taken)
    parser.add_class_arguments(TaskOptions, skip={*others})
    parser.add_class_arguments(TFB, skip={"base"})
    parser.required_path("output", "folder of the posterior")
    parser.option("overwrite", bool, False, OVERWRITE_HELP)


def add_distil(parser: Parser) -> None:
    """Options of `distil`."""
    parser.add_argument("posterior", type=Path, help="a folder of `fit`")
    parser.option("model", str | None, None, BASE_HELP)
    parser.option("bf16", bool | None, None, BF16_HELP)
    parser.add_class_arguments(DistillationRows)
    parser.add_class_arguments(Distilled, skip={"base"})
    # the method and the posterior say the first five
    others = ("lora", "steps", "epochs", "learning_rate", "bf16", "output")
    parser.add_class_arguments(Training, skip={*others})
    parser.required_path("output", "folder of the student")
    parser.option("overwrite", bool, False, OVERWRITE_HELP)


def add_export(parser: Parser) -> None:
    """Options of `export`."""
    parser.add_argument("posterior", type=Path, help=ARTEFACT_HELP)
    parser.required_path("to", "folder of the adapters and their manifest")
    parser.add_class_arguments(ExportOptions)
    parser.option("model", str | None, None, BASE_HELP)
    parser.option("overwrite", bool, False, "replace an earlier export in the folder")


def add_card(parser: Parser) -> None:
    """Options of `card`."""
    parser.add_argument("posterior", type=Path, help=ARTEFACT_HELP)
    add_card_facts(parser)
    parser.option("overwrite", bool, False, "replace the README.md that is there")


def add_push(parser: Parser) -> None:
    """Options of `push`."""
    parser.add_argument("posterior", type=Path, help=ARTEFACT_HELP)
    parser.add_argument("repo_id", type=str, help="owner/name; made if it is not there")
    parser.option("private", bool, False, "make a private repository")
    parser.option("revision", str | None, None, "a branch, made if it is not there")
    add_card_facts(parser)


def add_card_facts(parser: Parser) -> None:
    """Options of commands that write a card."""
    about = "its evaluations, a folder or file; left out, those in the posterior's folder"
    parser.option("records", Path | None, None, about)
    about = "what the base model is called on the Hub, where the fit took it from a folder"
    parser.option("base_model", str | None, None, about)


def add_calibrate(parser: Parser) -> None:
    """Options of `calibrate`."""
    parser.add_argument("posterior", type=Path, help=ARTEFACT_HELP)
    about = "rows with answers that training did not see: JSONL, CSV or parquet"
    parser.required_path("rows", about)
    parser.option("risk", float, 0.05, "largest error rate among the rows acted on")
    parser.option("confidence", float, 0.9, "with which the promise holds")
    parser.option("set_coverage", float, 0.9, "how often the right option is in a row's set")
    parser.option("set_kind", SetKind, "lac", "how the sets that predictions carry are made")
    about = "largest error rates by decision, as '{act: 0.05, flag: 0.2}'; other rows are \"ask\""
    parser.option("bands", dict[str, float], {}, about)
    parser.option("per_class", bool, False, "a threshold for each class by itself")
    parser.option("costs", list[list[float]], [], "of errors: for each right answer a list")
    parser.option("model", str | None, None, BASE_HELP)
    parser.add_class_arguments(VariantOptions)
    parser.add_class_arguments(RowOptions)


def add_rank(parser: Parser) -> None:
    """Options of `rank`."""
    parser.add_argument("posterior", type=Path, help=ARTEFACT_HELP)
    parser.required_path("rows", "JSONL, CSV or parquet rows, with answers or without")
    parser.option("number", int | None, None, "how many rows to take; left out: all")
    parser.option(
        "by", Acquisition | None, None, "the rule; left out: bald; with one draw: entropy"
    )
    parser.option("draws", int, 10, "posterior draws; 0 for the mean")
    parser.option("draw_seed", int, 0, 'of the draws, and of "random"')
    parser.option("output", Path | None, None, "a file; left out: standard output")
    parser.option("overwrite", bool, False, "replace the output file")
    parser.option("model", str | None, None, BASE_HELP)
    parser.option("bf16", bool | None, None, BF16_HELP)
    parser.add_class_arguments(RowOptions, skip={"answer_is", "unsure", "trained_on"})


def add_drift(parser: Parser) -> None:
    """Options of `drift`."""
    parser.add_argument("posterior", type=Path, help="a calibrated posterior or adapter")
    parser.required_path("rows", "JSONL, CSV or parquet rows, with answers or without")
    parser.option("level", float, 0.05, "how often rows like the held-out ones may alarm")
    parser.option("columns", dict[str, str], {}, COLUMNS_HELP)
    parser.option("scores", list[str], [], "which scores to compare; left out: a few")
    parser.option("output", Path | None, None, "a file for the figures; left out: none")
    parser.option("overwrite", bool, False, "replace the output file")
    parser.option("model", str | None, None, BASE_HELP)


def add_serve(parser: Parser) -> None:
    """Options of `serve`."""
    about = f"each {ARTEFACT_HELP}, calibrated; the first one is the default"
    parser.add_argument("posteriors", type=Path, nargs="+", help=about)
    parser.option("model", str | None, None, BASE_HELP)
    parser.add_class_arguments(ServiceOptions)
    parser.add_class_arguments(Limits)


def add_bench(parser: Parser) -> None:
    """Options of `bench`."""
    parser.add_class_arguments(Grid)
    parser.required_path("output", "folder of the results")
    parser.option("launcher", Launcher, "local", "this process, or a Ray cluster")
    parser.option("only_tasks", list[str], [], "run the cells of these tasks only")
    parser.option("only_methods", list[str], [], "run the cells of these methods only")
    parser.option("discard_fits", bool, False, "remove the saved posteriors at the end")


def add_table(parser: Parser) -> None:
    """Options of `table`."""
    parser.add_argument("results", type=Path, help="folder of `bench` or `compare`")
    parser.option("style", Style, "text", "for a terminal, a page or a paper (booktabs)")
    parser.option("resamples", int, 1000, "of the paired bootstrap; 0 for no p-values")
    parser.option("against", str | None, None, 'compare with this method, as "BLoB N=10"')
    parser.option("output", Path | None, None, "a file; left out: standard output")


def add_report(parser: Parser) -> None:
    """Options of `report`."""
    about = "folders of `compare`, `bench` or `evaluate`, folders of such, or files of records"
    parser.add_argument("results", type=Path, nargs="+", help=about)
    parser.required_path("to", "the page, such as report.html; one that is there is replaced")
    parser.option("title", str | None, None, "of the page; left out: the tasks and models")


def add_demo(parser: Parser) -> None:
    """Options of `demo`."""
    parser.option("model", str | None, None, MODEL_HELP)
    parser.option("output", Path, Path("runs/demo"), "folder of the report")
    parser.option("overwrite", bool, False, OVERWRITE_HELP)
