import ast
import re
from pathlib import Path

import pytest
import yaml

from bayestune.cli import main
from bayestune.cli.options import build, chosen_methods
from bayestune.cli.parser import COMMANDS, make_parser, parse
from bayestune.methods import MAP, MLE, TFB
from bayestune.training import Training

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
USED = {
    "fit": "--output out --steps 7 --blob.prior_std 0.3 --lora.targets [q_proj]",
    "compare": "--output out --methods [blob] --draws [0,3] --on held_out --overwrite "
    "--progress=false",
    "evaluate": "--posterior out --draws [2] --binning textbook --bf16 false",
    "predict": '--posterior out --input rows.jsonl --options ["yes","no"] --bf16 --decided '
    "--shared_prefix 4",
    "bayesianise": "adapter --anchor rows.jsonl --output out --metric accuracy",
    "distil": "in --unlabelled rows.jsonl --output out --draws 3 --seed 2 --bf16 --labelled",
    "bench": "--output out --seeds [4] --methods.tfb.base mle --training.lora.rank 3",
    "table": "out --style latex",
    "report": "out more/records.jsonl --to report.html",
    "demo": "",
}


def parsed(command, *arguments):
    return make_parser().parse_args([command, *map(str, arguments)])[command]


def instantiated(command, *arguments):
    parser = make_parser()
    return parser.instantiate(parser.parse_args([command, *arguments]))[command]


def assert_given(given, got):
    for key, value in given.items():
        if isinstance(value, dict):
            assert_given(value, got[key])
        else:
            found = str(got[key]) if isinstance(got[key], Path) else got[key]
            assert found == (tuple(value) if isinstance(found, tuple) else value), key


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_preset_parses_with_the_command_it_names(path):
    text = path.read_text(encoding="utf-8")
    command = re.search(r"^#.*bayestune (\w+)", text, re.MULTILINE)[1]
    assert command in ("fit", "compare", "evaluate", "bench")
    needed = ["--output", "out"] + (["--posterior", "in"] if command == "evaluate" else [])
    options = parsed(command, "--config", path, *needed).as_dict()
    assert_given(yaml.safe_load(text), options)


@pytest.mark.parametrize("command", USED)
def test_a_printed_configuration_parses_to_the_same(command, tmp_path, capsys):
    arguments = USED[command].split()
    with pytest.raises(SystemExit) as end:
        main([command, *arguments, "--print_config"])
    assert end.value.code == 0
    (tmp_path / "config.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    again = parsed(command, "--config", tmp_path / "config.yaml")
    direct = parsed(command, *arguments)
    assert {**again.as_dict(), "config": None} == {**direct.as_dict(), "config": None}


def test_options_become_the_dataclasses():
    options = instantiated("fit", *USED["fit"].split())
    assert chosen_methods(["blob"], options)["blob"].prior_std == 0.3
    training = build(Training, options, output=None)
    assert (training.resume, training.progress, options.overwrite) == (False, True, False)
    assert (training.steps, training.lora.targets, training.lora.rank) == (7, ("q_proj",), 8)


def test_a_boolean_option_alone_is_true():
    given = ("--resume", "--output", "out", "--bf16", "--progress", "false", "--overwrite")
    options = parsed("fit", *given)
    assert (options.resume, options.bf16, options.overwrite) == (True, True, True)
    assert options.progress is False
    reading = ("--posterior", "in", "--input", "rows.jsonl")
    for more, expected in (((), None), (("--bf16",), True), (("--bf16=false",), False)):
        assert parsed("predict", *reading, *more).bf16 is expected


@pytest.mark.parametrize(
    ("habit", "meant"),
    [
        ("predict in --rows r.jsonl", "predict --posterior in --input r.jsonl"),
        ("predict in --rows=-", "predict --posterior in --input -"),
        ("evaluate in --rows r.csv", "evaluate --posterior in --evaluation_data r.csv"),
        ("generate in --rows r.jsonl", "generate --posterior in --input r.jsonl"),
        ("bench preset:small/grid --output out", "bench --config preset:small/grid --output out"),
    ],
)
def test_every_command_takes_a_folder_first_and_its_rows_by_rows(habit, meant):
    (command, got), (same, expected) = parse(habit.split()), parse(meant.split())
    del got["command_line"], expected["command_line"]
    assert (command, got) == (same, expected)


def test_a_base_is_for_methods_that_build_on_another():
    options = instantiated("compare", "--output", "out", "--base", "map")
    chosen = chosen_methods(["mle", "tfb"], options)
    assert (chosen["mle"], chosen["tfb"]) == (MLE(), TFB(base=MAP()))
    with pytest.raises(ValueError, match=r"--base is for methods that build .* got 'map' for"):
        chosen_methods(["mle", "blob"], options)


@pytest.mark.parametrize(
    "arguments",
    [
        "fit",
        "learn",
        "fit --output out --speed 3",
        "compare --output out --on train",
        "predict --posterior in --input rows.jsonl --least 4",
        "predict --posterior in --input rows.jsonl --standard_error 0.1",
    ],
)
def test_arguments_that_do_not_parse_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments.split())
    assert end.value.code == 2
    assert "error" in capsys.readouterr().err


def test_the_package_names_only_commands_that_exist():
    for path in (ROOT / "src").rglob("*.py"):
        named = re.findall(r"`bayestune ([a-z][\w-]*)", path.read_text(encoding="utf-8"))
        assert set(named) <= set(COMMANDS), path


# git, pip, accelerate, vLLM, the Hub's command line, and what argparse adds
OF_OTHERS = {"--always", "--dirty", "--exclude", "--show-toplevel", "--no-deps", "--only-binary"}
OF_OTHERS |= {"--multi_gpu", "--mixed_precision", "--fsdp_version", "--local-dir", "--version"}
OF_OTHERS |= {"--enable-lora", "--lora-modules", "--max-lora-rank", "--max-loras"}


def test_every_option_that_the_source_names_exists():
    """A refusal's remedy can be typed."""
    (commands,) = (a for a in make_parser()._actions if isinstance(a.choices, dict))
    known = set(OF_OTHERS)
    for command in COMMANDS:
        known.update(*(action.option_strings for action in commands.choices[command]._actions))
    unknown = {}
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named = re.findall(r"(?<![\w-])--[a-z](?:[\w.-]*\w)?", node.value)
                unknown |= {name: path.name for name in named if name not in known}
    assert unknown == {}
