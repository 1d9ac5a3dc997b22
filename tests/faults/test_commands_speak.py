"""What the commands say: quickly, in a line, with the option that was meant, without tracebacks."""

import errno
import json
import logging
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from transformers.utils import logging as transformers_logging

from bayestune.cli import guard, main, parser, slips, start
from bayestune.cli.answers import LineWriter
from bayestune.methods import METHODS
from bayestune.whole_files import json_line
from running import failed, fitting, furnish, run


@pytest.fixture
def place(tmp_path, llama, byte_level):
    """A folder with rows and a model whose answers are not all alike."""
    return furnish(tmp_path, llama(initializer_range=0.3), byte_level)


@pytest.fixture
def ends_with(monkeypatch):
    """Makes `predict` end with an error."""

    def put(error):
        def command(_):
            raise error

        _, options = parser.COMMANDS["predict"]
        monkeypatch.setitem(parser.COMMANDS, "predict", (command, options))
        return ["predict", "--posterior=a", "--input=b"]

    return put


# Without torch


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["fti"]])
def test_help_and_version_load_nothing_heavy(arguments):
    code = (
        "import sys\nfrom bayestune.cli import main\n"
        f"try:\n    main({arguments})\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'transformers', 'jsonargparse'} & set(sys.modules)"
    )
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - begin < 5  # a tenth of a second where nothing else runs


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in parser.COMMANDS)
    assert set(start.COMMANDS) == set(parser.COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("bayestune ")
    assert main([]) == 2


def test_the_module_can_be_run_and_imported():
    code = "import bayestune.__main__"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    command = [sys.executable, "-m", "bayestune", "--version"]
    said = subprocess.check_output(command, text=True, timeout=60)
    assert said.startswith("bayestune ")


# Slips


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("predcit --input a", "unknown command: got 'predcit', expected one of fit, evaluate, "),
        ("fit", "bayestune fit needs --output; see bayestune fit --help"),
        ("bayesianise", "bayestune bayesianise needs ADAPTER, --anchor, --output"),
        ("predict", "bayestune predict needs POSTERIOR, --rows; see bayestune predict --help"),
        ("calibrate", "bayestune calibrate needs POSTERIOR, --rows"),
        ("push runs/tickets", "bayestune push needs REPO_ID;"),
        ("report", "bayestune report needs RESULTS …, --to"),
        ("fit --output o --learning_rte 3", "no option --learning_rte, did you mean --learning_r"),
        ("fit --output o --step 3", "there is no option --step, did you mean --steps?"),
        ("fit --output o --rank 3", "there is no option --rank, did you mean --"),
        ("fit --output o --blob.prior 3", "--blob.prior, did you mean --blob.prior_std?"),
        ("fit --output o --steps x", "--steps: got 'x', expected a whole number"),
        ("fit --output o --epochs x", "--epochs: got 'x', expected a number or null"),
        ("fit --output o --resume maybe", "--resume: got 'maybe', expected true or false"),
        ("compare --output o --on train", "got 'train', expected one of 'evaluation', 'held_out'"),
        ("fit --output o --lora.targets 3", "expected a list such as [a,b] or null"),
        ("fit --output o --config no.yaml", "File does not exist"),
        ("fit --output", "--output: expected one argument"),
    ],
)
def test_a_slip_is_told_in_a_line_with_what_was_meant(capsys, arguments, said):
    with pytest.raises(SystemExit) as end:
        main(arguments.split())
    assert end.value.code == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.startswith("bayestune: error: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_an_unknown_key_of_a_file_is_told(tmp_path, capsys):
    (tmp_path / "own.yaml").write_text("lora:\n  ranc: 3\n")
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--output=o", f"--config={tmp_path / 'own.yaml'}"])
    assert "there is no option --lora.ranc, did you mean --lora.rank?" in capsys.readouterr().err


# Help of a command


def helped(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main([*arguments])
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "usage"),
    [
        ("predict", "predict POSTERIOR --rows ROWS"),
        ("push", "push POSTERIOR REPO_ID"),
        ("serve", "serve POSTERIORS …"),
        ("bench", "bench [CONFIG] --output OUTPUT"),
    ],
)
def test_help_begins_with_what_must_be_typed(capsys, command, usage):
    first = helped(capsys, command, "--help").partition("\n")[0]
    assert first == f"usage: bayestune {usage} [--OPTION VALUE …]"


def test_help_has_the_options_of_the_method_that_is_named(capsys):
    said = helped(capsys, "fit", "--method", "laplace", "--help")
    assert "--laplace.structure" in said
    assert "--blob.prior_std" not in said
    assert said.count("\n") < 145
    assert "The options of other methods: bayestune fit --method NAME --help" in said
    assert "--blob.prior_std" in helped(capsys, "fit", "--help")
    both = helped(capsys, "compare", "--methods=[swag,tfb]", "--help")
    assert "--swag.rank" in both
    assert "--tfb.anchors" in both
    every = helped(capsys, "fit", "--help", "all")
    options = slips.options_of(parser.make_parser()._subcommands_action.choices["fit"])
    assert all(option in every for option in options)
    assert sum(f"--{name}." in every for name in METHODS) > 10


# What goes wrong


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "memory ran out (MemoryError): lower --batch_size"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to"), "memory ran out (CUDA out of"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), "choose a smaller --mod"),
        (OSError(errno.ENOSPC, "No space left on device", "x.json"), "no space left for x.json"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0"), "no space left for the"),
        (ValueError("one\ntwo"), "error: one two"),
    ],
)
def test_what_goes_wrong_is_told_in_a_line(capsys, ends_with, error, said):
    assert said in failed(ends_with(error), capsys)


def test_the_unexpected_is_told_in_a_line_and_its_traceback_is_kept(capsys, ends_with):
    assert main(ends_with(KeyError("prompt"))) == guard.EXIT_UNEXPECTED == 70
    said = capsys.readouterr().err
    assert said.startswith("bayestune: error: unexpected KeyError: 'prompt'")
    assert said.count("\n") == 1
    note = Path(said.split()[-1])
    assert "Traceback" in note.read_text()
    note.unlink()


@pytest.mark.parametrize(
    "change",
    [{"task": None}, {"training": 3}],
)
def test_a_damaged_posterior_is_no_traceback(place, capsys, change):
    run(*fitting(place, method="mle"))
    path = place / "out/posterior.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    code = main(["predict", f"--posterior={place / 'out'}", f"--input={place / 'ask.jsonl'}"])
    captured = capsys.readouterr()
    assert code in (2, 70)
    assert "Traceback" not in captured.err


def test_a_reader_that_has_had_enough_is_no_error(capsys, ends_with):
    assert main(ends_with(BrokenPipeError(errno.EPIPE, "Broken pipe"))) == 0
    assert capsys.readouterr().err == ""


def write_many(_):
    with LineWriter(None) as writer:
        for _ in range(20_000):
            writer.write({"question": "grün"})


def in_a_process(stdout, stderr, others=()):
    """A command in a process of its own, whose terminal knows ASCII only; returns the process."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            for number in others:  # the reader's end, whose reader is not here
                os.close(number)
            os.dup2(stdout, 1)
            os.dup2(stderr, 2)
            sys.stdout = os.fdopen(1, "w", encoding="ascii")
            sys.stderr = os.fdopen(2, "w", buffering=1, encoding="ascii")
            parser.COMMANDS["predict"] = (write_many, parser.COMMANDS["predict"][1])
            code = main(["predict", "--posterior=a", "--input=b"])
            sys.stdout.close()
        finally:
            os._exit(code)
    return child


def exit_code(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_pipe_that_breaks_is_survived(tmp_path):
    reading, writing = os.pipe()
    with (tmp_path / "errors").open("w+b") as errors:
        child = in_a_process(writing, errors.fileno(), [reading])
        os.close(writing)
        with os.fdopen(reading, "rb") as lines:
            assert json.loads(lines.readline()) == {"question": "grün"}
        assert exit_code(child) == 0
        errors.seek(0)
        assert errors.read() == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
def test_a_full_disk_is_told_in_a_line(tmp_path):
    with (tmp_path / "errors").open("w+b") as errors, Path("/dev/full").open("wb") as full:
        assert exit_code(in_a_process(full.fileno(), errors.fileno())) == 2
        errors.seek(0)
        said = errors.read().decode()
    assert said.startswith("bayestune: error: no space left for the output")
    assert said.count("\n") == 1


def test_any_text_is_written_as_json_in_utf_8(tmp_path):
    rows = [{"question": "grün 漢 🙂"}, {"question": "half a pair \ud83d"}]
    with LineWriter(tmp_path / "rows.jsonl") as writer:
        for row in rows:
            writer.write(row)
    lines = (tmp_path / "rows.jsonl").read_bytes().decode("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == rows
    assert "grün" in json_line(rows[0])


# Bars, colours, warnings


def is_quiet(text):
    return "it/s" not in text and "%|" not in text and "\x1b[" not in text


def test_a_log_that_is_no_terminal_has_lines_instead_of_bars(place, capfd, caplog):
    caplog.set_level(logging.INFO, "bayestune")
    command = [one for one in fitting(place, method="mle") if "progress" not in one]
    run(*command, "--logging_steps=1")
    out, err = capfd.readouterr()
    assert is_quiet(out + err)
    assert out == f"posterior in {place / 'out'}\n"
    assert "step 3 of 3: loss " in caplog.text


def test_quiet_has_neither_bars_nor_notes(place, capfd, monkeypatch, caplog):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run(*[one for one in fitting(place, method="mle") if "progress" not in one], "--quiet")
    out, err = capfd.readouterr()
    assert is_quiet(out + err)
    assert logging.getLogger("bayestune").level == logging.WARNING
    reading = (f"--posterior={place / 'out'}", f"--input={place / 'ask.jsonl'}")
    run("predict", *reading, f"--output={place / 'a.jsonl'}", "--quiet")
    out, err = capfd.readouterr()
    assert out == ""
    assert is_quiet(err)
    assert not transformers_logging.is_progress_bar_enabled()
    run("predict", *reading, f"--output={place / 'b.jsonl'}")
    assert "predict" in capfd.readouterr().err  # a terminal has a bar unless told otherwise


def test_a_fit_warns_of_no_old_names(place):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        run(*fitting(place, method="mle", gradient_checkpointing="true"))
