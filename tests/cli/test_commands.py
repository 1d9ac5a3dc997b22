import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open

from bayestune.cli import commands, main
from bayestune.cli import parser as cli
from bayestune.cli.parser import make_parser
from bayestune.evaluation import read_records
from bayestune.training import Interrupted
from bayestune.training.training import newest_checkpoint

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))
COLOURS = ("red", "green", "blue", "the sky")


# Parsing


def command_of(path):
    """The command that a preset names in its first comment."""
    return re.search(r"^#.*bayestune (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)[1]


def parsed(command, *arguments):
    parser = make_parser()
    return parser.parse_args([command, *map(str, arguments)])[command]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_preset_parses_with_the_command_it_names(path):
    command = command_of(path)
    assert command in ("fit", "compare", "evaluate", "bench")
    needed = ["--output", "out"] + (["--posterior", "in"] if command == "evaluate" else [])
    options = parsed(command, "--config", path, *needed).as_dict()

    def check(given, got):
        for key, value in given.items():
            if isinstance(value, dict):
                check(value, got[key])
            else:
                assert got[key] == (tuple(value) if isinstance(got[key], tuple) else value), key

    check(yaml.safe_load(path.read_text(encoding="utf-8")), options)


REQUIRED = {
    "fit": (
        "--output",
        "out",
        "--steps",
        "7",
        "--blob.prior_std",
        "0.3",
        "--lora.targets",
        "[q_proj]",
    ),
    "compare": (
        "--output",
        "out",
        "--methods",
        "[blob]",
        "--draws",
        "[0,3]",
        "--on",
        "held_out",
        "--overwrite",
        "--progress=false",
    ),
    "evaluate": ("--posterior", "out", "--draws", "[2]", "--binning", "textbook"),
    "predict": (
        "--posterior",
        "out",
        "--input",
        "rows.jsonl",
        "--options",
        '["yes", "no"]',
        "--bf16",
        "--standard_error",
        "0.02",
        "--decided",
        "--shared_prefix",
        "4",
    ),
    "bayesianise": ("adapter", "--anchor", "rows.jsonl", "--output", "out", "--metric", "accuracy"),
    "bench": (
        "--output",
        "out",
        "--seeds",
        "[4]",
        "--methods",
        "{tfb: {base: mle}}",
        "--training.lora.rank",
        "3",
    ),
    "table": ("out", "--style", "latex"),
    "demo": (),
}


@pytest.mark.parametrize("command", REQUIRED)
def test_a_printed_configuration_parses_to_the_same(command, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, *REQUIRED[command], "--print_config"])
    assert end.value.code == 0
    (tmp_path / "config.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    again = parsed(command, "--config", tmp_path / "config.yaml")
    direct = parsed(command, *REQUIRED[command])
    assert {**again.as_dict(), "config": None} == {**direct.as_dict(), "config": None}


def test_options_become_the_dataclasses():
    parser = make_parser()
    options = parser.instantiate(parser.parse_args(["fit", *REQUIRED["fit"]])).fit
    assert cli._method("blob", options).prior_std == 0.3
    training = cli._built(cli.Training, options, output=None)
    assert (training.resume, training.progress, options.overwrite) == (False, True, False)
    assert (training.steps, training.lora.targets, training.lora.rank) == (7, ("q_proj",), 8)


def test_a_boolean_option_alone_is_true():
    options = parsed(
        "fit", "--resume", "--output", "out", "--bf16", "--progress", "false", "--overwrite"
    )
    assert (options.resume, options.bf16, options.progress, options.overwrite) == (
        True,
        True,
        False,
        True,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["fit"],
        ["learn"],
        ["fit", "--output", "out", "--speed", "3"],
        ["compare", "--output", "out", "--on", "train"],
    ],
)
def test_arguments_that_do_not_parse_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "error" in capsys.readouterr().err


# The commands, on a tiny model and rows of one's own


def own_rows(count, start=0):
    rows = ((i, COLOURS[: 3 + i % 2]) for i in range(start, start + count))
    return [
        {"question": f"what is {COLOURS[i % 4]} ({i})?", "options": o, "answer": i % len(o)}
        for i, o in rows
    ]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def place(tmp_path, llama, byte_level):
    """A folder with a model and rows."""
    llama().save_pretrained(tmp_path / "model")
    byte_level.save_pretrained(tmp_path / "model")
    write_rows(tmp_path / "train.jsonl", own_rows(8))
    write_rows(tmp_path / "test.jsonl", own_rows(5, start=3))
    return tmp_path


def fitting(place, command="fit", output="out", **options):
    given = {
        "model": place / "model",
        "data": place / "train.jsonl",
        "output": place / output,
        "steps": 3,
    }
    given = {**given, "batch_size": 2, "progress": "false", "lora.rank": 2, **options}
    return [command, *(f"--{name}={value}" for name, value in given.items())]


def read_json_lines(text):
    return [json.loads(line) for line in text.split("\n") if line]


def steps_of(folder):
    return json.loads((folder / "training.json").read_text())["steps"]


def failed(arguments, capsys):
    """The one line that a command which must fail says."""
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.split("\n") if line.startswith("bayestune: error: ")]
    assert len(lines) == 1
    assert captured.err.endswith(f"{lines[0]}\n")
    assert captured.out == ""
    return lines[0]


def test_fit_evaluate_and_predict(place, capsys):
    out = place / "out"
    assert main(fitting(place, method="blob", scoring="text", **{"blob.final_std": 0.1})) == 0
    names = {
        "adapter_config.json",
        "adapter_model.safetensors",
        "posterior.json",
        "posterior.safetensors",
    }
    assert names | {"training.json"} <= {file.name for file in out.iterdir()}
    details = json.loads((out / "posterior.json").read_text())
    assert (details["method"], details["scoring"], details["train_rows"]) == ("blob", "text", 8)
    assert details["fields"]["final_std"] == 0.1
    assert steps_of(out) == 3

    reading = [f"--posterior={out}", f"--evaluation_data={place / 'test.jsonl'}"]
    assert main(["evaluate", *reading, "--draws=[0,2]", "--resamples=20"]) == 0
    records = read_records(out)
    assert [(r["draws"], r["n"], r["task"], r["method"]) for r in records] == [
        (0, 5, "test", "blob"),
        (2, 5, "test", "blob"),
    ]
    for record in records:
        assert (
            0 <= record["metrics"]["accuracy"]["low"] <= record["metrics"]["accuracy"]["high"] <= 1
        )
    table = capsys.readouterr().out
    assert "blob N=2" in table
    assert "NLL" in table

    assert (
        main(["evaluate", *reading, "--draws=[1]", "--resamples=20", f"--output={place / 'apart'}"])
        == 0
    )
    assert [record["draws"] for record in read_records(place / "apart")] == [1]
    assert read_records(out) == records

    asked = write_rows(place / "ask.jsonl", [{"question": "what is red?"}, *own_rows(3)])
    capsys.readouterr()
    predict = [
        "predict",
        f"--posterior={out}",
        f"--input={asked}",
        '--options=["yes", "no"]',
        "--draws=3",
    ]
    assert main(predict) == 0
    lines = read_json_lines(capsys.readouterr().out)
    assert [line["options"] for line in lines] == [
        ["yes", "no"],
        *(list(row["options"]) for row in own_rows(3)),
    ]
    assert [line["answer"] for line in lines] == [None, 0, 1, 2]
    for line in lines:
        assert len(line["probabilities"]) == len(line["options"])
        assert sum(line["probabilities"]) == pytest.approx(1)
        assert (
            line["confidence"]
            == max(line["probabilities"])
            == line["probabilities"][line["choice"]]
        )
    assert main([*predict, f"--output={place / 'answers.jsonl'}"]) == 0
    assert read_json_lines((place / "answers.jsonl").read_text()) == lines
    assert "is there already: choose another --output, or give --overwrite" in failed(
        [*predict, "--draws=1", f"--output={place / 'answers.jsonl'}"], capsys
    )
    assert read_json_lines((place / "answers.jsonl").read_text()) == lines
    assert main([*predict, "--draws=1", "--overwrite", f"--output={place / 'answers.jsonl'}"]) == 0
    assert read_json_lines((place / "answers.jsonl").read_text()) != lines


def test_shared_prefixes_and_rounds_of_draws(place, llama, capsys):
    out = place / "out"
    llama(initializer_range=0.3).save_pretrained(
        place / "model"
    )  # one whose answers are not all alike
    assert (
        main(
            fitting(place, learning_rate=0.1, **{"blob.init_root_std": 0.7, "blob.prior_std": 1.0})
        )
        == 0
    )
    evaluate = [
        "evaluate",
        f"--posterior={out}",
        f"--evaluation_data={place / 'test.jsonl'}",
        "--resamples=20",
    ]
    assert main([*evaluate, "--draws=[0,2]", "--shared_prefix=3"]) == 0
    assert "blob N=2, prefix 3" in capsys.readouterr().out
    assert main([*evaluate, "--draws=[2]"]) == 0
    records = read_records(out)
    assert [r["label"] for r in records] == ["blob N=0", "blob N=2, prefix 3", "blob N=2"]
    assert [r["config"]["predicting"]["shared_prefix"] for r in records] == [3, 3, None]
    assert records[1]["metrics"]["nll"]["value"] != pytest.approx(
        records[2]["metrics"]["nll"]["value"], abs=1e-6
    )

    asked = write_rows(place / "ask.jsonl", own_rows(7))

    def predicted(*options):
        capsys.readouterr()
        assert main(["predict", f"--posterior={out}", f"--input={asked}", *options]) == 0
        return read_json_lines(capsys.readouterr().out)

    def probabilities(lines):
        return [p for line in lines for p in line["probabilities"]]

    plain = predicted("--draws=5")
    assert not any("draws" in line for line in plain)
    assert probabilities(predicted("--draws=5", "--shared_prefix=3")) != pytest.approx(
        probabilities(plain), abs=1e-4
    )
    rounds = "--draws=5", "--least=2", "--round_size=1"
    never = predicted(*rounds, "--standard_error=1e-9")
    assert [line["draws"] for line in never] == [5] * 7
    assert probabilities(never) == pytest.approx(probabilities(plain), abs=1e-5)
    soon = predicted(*rounds, "--standard_error=0.5")
    assert [line["draws"] for line in soon] == [2] * 7
    assert probabilities(soon) == pytest.approx(probabilities(predicted("--draws=2")), abs=1e-5)
    many = predicted("--draws=9")
    decided = predicted("--draws=9", "--least=2", "--round_size=1", "--decided")
    assert [line["choice"] for line in decided] == [line["choice"] for line in many]
    assert 5 <= min(line["draws"] for line in decided) < 9
    prefixed = predicted(*rounds, "--standard_error=1e-9", "--shared_prefix=3")
    expected = predicted("--draws=5", "--shared_prefix=3")
    assert probabilities(prefixed) == pytest.approx(probabilities(expected), abs=1e-5)
    predict = ["predict", f"--posterior={out}", f"--input={asked}"]
    assert "too few draws: got most=0, least=4" in failed(
        [*predict, "--draws=0", "--decided"], capsys
    )
    assert "only reached if it is positive: got 0.0" in failed(
        [*predict, "--standard_error=0"], capsys
    )


def test_predict_asks_as_the_fit_did(place, capsys):
    """The letters and the passage of the posterior's own prompt, not those of the rows at hand."""
    passages = [{**row, "context": "the sky is blue"} for row in own_rows(8)]
    write_rows(place / "train.jsonl", passages)
    assert main(fitting(place, method="mle", learning_rate=0.1)) == 0
    one = write_rows(place / "one.jsonl", passages[:1])
    none = write_rows(place / "none.jsonl", own_rows(1))
    answers = []
    for asked in (one, none):
        capsys.readouterr()
        assert main(["predict", f"--posterior={place / 'out'}", f"--input={asked}"]) == 0
        answers += read_json_lines(capsys.readouterr().out)
    assert answers[0]["probabilities"] != pytest.approx(answers[1]["probabilities"], abs=1e-4)


def test_compare_writes_a_report_and_resumes(place, capsys):
    comparing = fitting(
        place, "compare", evaluation_data=place / "test.jsonl", draws="[0,2]", resamples=20
    )
    assert main(comparing) == 0
    out = place / "out"
    records = read_records(out)
    assert [(record["method"], record["draws"]) for record in records] == [
        ("mle", 0),
        ("blob", 0),
        ("blob", 2),
    ]
    assert [record["label"] for record in records] == ["MLE", "BLoB N=0", "BLoB N=2"]
    assert all((out / record["predictions"]).is_file() for record in records)
    assert {"table.md", "summary.png", "report.html", "mle", "blob"} <= {
        file.name for file in out.iterdir()
    }
    table = (out / "table.md").read_text()
    assert all(record["label"] in table for record in records)
    for name in ("mle", "blob"):
        assert (out / name / "posterior.json").is_file()

    assert "is not empty: choose another --output" in failed(comparing, capsys)
    assert read_records(out) == records
    (out / "records.jsonl").write_text(json.dumps(records[0]) + "\n")
    assert main([*comparing, "--resume"]) == 0
    again = read_records(out)
    assert again[0] == records[0]
    assert [(record["method"], record["draws"]) for record in again] == [
        ("mle", 0),
        ("blob", 0),
        ("blob", 2),
    ]
    for now, before in zip(again, records, strict=True):
        assert now["metrics"]["nll"]["value"] == pytest.approx(
            before["metrics"]["nll"]["value"], abs=1e-6
        )
        assert (
            now["seconds"]["fit"] == before["seconds"]["fit"]
        )  # taken from the saved posterior, not fitted again


def test_compare_on_rows_held_out_of_train(place, capsys):
    comparing = fitting(place, "compare", methods="[mle]", on="held_out", resamples=20)
    assert "no rows to evaluate on in 'held_out'" in failed(comparing, capsys)
    assert main([*comparing, "--holdout=0.25"]) == 0
    (record,) = read_records(place / "out")
    assert (record["n"], record["train_rows"], record["rows"]) == (2, 6, "held_out")


def test_output_is_only_overwritten_when_told_to(place, capsys):
    out = place / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert "is not empty: choose another --output, or give --overwrite" in failed(
        fitting(place), capsys
    )
    assert (out / "notes.txt").read_text() == "mine"
    assert main([*fitting(place), "--overwrite"]) == 0
    assert not (out / "notes.txt").exists()
    assert (out / "posterior.json").is_file()


@pytest.mark.parametrize(
    "mistake",
    [
        {"model": "/no/such/model"},
        {"task": "arc"},
        {"method": "sgd"},
        {"data": "-"},
    ],
)
def test_a_mistake_never_costs_the_old_output(place, capsys, mistake):
    out = place / "out"
    out.mkdir()
    (out / "posterior.json").write_text("old")
    if "task" in mistake:
        arguments = [a for a in fitting(place, **mistake) if not a.startswith("--data=")]
    else:
        arguments = fitting(place, **mistake)
    failed([*arguments, "--overwrite"], capsys)
    assert (out / "posterior.json").read_text() == "old"


def test_bad_names_are_told_with_what_was_expected(place, capsys):
    assert "unknown model '/no/such': no such directory" in failed(
        fitting(place, model="/no/such"), capsys
    )
    assert "unknown method: got 'sgd', expected one of ['bbb', 'blob'" in failed(
        fitting(place, method="sgd"), capsys
    )
    task = [a for a in fitting(place, task="arc") if not a.startswith("--data=")]
    assert "unknown task: got 'arc', expected one of ['arc_challenge'" in failed(task, capsys)
    assert not (place / "out").exists()


def test_bad_rows_are_told_by_file_and_line(place, capsys):
    write_rows(place / "train.jsonl", [*own_rows(2), {"questions": "?", "answer": 0}])
    line = failed(fitting(place), capsys)
    assert (
        "row train.jsonl:3: no column 'question' or 'text'; got the columns ['answer', 'questions']"
        in line
    )
    write_rows(place / "train.jsonl", [{**row, "answer": "pink"} for row in own_rows(2)])
    assert "row train.jsonl:1: the right answer 'pink' is not among its options ['red'" in failed(
        fitting(place), capsys
    )
    write_rows(place / "train.jsonl", [{**row, "answer": 0} for row in own_rows(2)])
    assert "got one class, expected two or more" in failed(fitting(place), capsys)


def test_a_plain_adapter_is_no_posterior(place, capsys):
    assert main(fitting(place, method="mle")) == 0
    asking = [f"--posterior={place / 'out'}", f"--model={place / 'model'}"]
    (place / "out" / "posterior.json").unlink()
    evaluate = ["evaluate", *asking, f"--evaluation_data={place / 'test.jsonl'}"]
    for command in (evaluate, ["predict", *asking, f"--input={place / 'test.jsonl'}"]):
        line = failed(command, capsys)
        assert (
            "out is no posterior: got a plain LoRA adapter without posterior.json, expected a folder of `fit`"
            in line
        )
    shutil.rmtree(place / "out")
    assert "is no posterior: got no adapter" in failed(evaluate, capsys)


def test_an_adapter_is_no_model(place, capsys):
    assert main(fitting(place, method="mle")) == 0
    assert "is an adapter (it has adapter_config.json)" in failed(
        fitting(place, model=place / "out", output="next"), capsys
    )


def test_a_missing_library_is_told_in_a_line(place, capsys, monkeypatch):
    def missing(*_):
        raise ImportError("got a GGUF model, expected gguf to be installed")

    monkeypatch.setattr(commands, "open_model", missing)
    assert (
        failed(fitting(place), capsys)
        == "bayestune: error: got a GGUF model, expected gguf to be installed"
    )


# Ctrl-C


@pytest.mark.parametrize(
    "interrupt", [KeyboardInterrupt(), Interrupted("stopped at step 7; go on with --resume")]
)
def test_ctrl_c_is_exit_code_130(monkeypatch, capsys, interrupt):
    def interrupted(_):
        raise interrupt

    make, _, summary = cli.COMMANDS["predict"]
    monkeypatch.setitem(cli.COMMANDS, "predict", (make, interrupted, summary))
    assert main(["predict", "--posterior=a", "--input=b"]) == 130
    assert capsys.readouterr().err == f"bayestune: {str(interrupt) or 'interrupted'}\n"


def wait_for(stream, pattern):
    seen = b""
    while not re.search(pattern, seen):
        byte = stream.read(1)
        assert byte, seen.decode()
        seen += byte


def test_ctrl_c_leaves_a_checkpoint_that_resume_goes_on_from(place):
    command = fitting(place, method="blob", steps=100_000, progress="true", logging_steps=1)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "bayestune", *command],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    ) as process:
        wait_for(process.stderr, rb"[ |][1-9]\d*/100000")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    stopped = int(
        re.search(r"bayestune: stopped at step (\d+); go on with --resume", errors.decode())[1]
    )
    checkpoint = newest_checkpoint(place / "out" / "checkpoints")
    assert checkpoint.name == f"checkpoint-{stopped}"
    with safe_open(checkpoint / "adapter_model.safetensors", "pt") as tensors:
        assert len(list(tensors.keys())) > 0
    assert not (place / "out" / "posterior.json").exists()

    more = fitting(place, method="blob", steps=stopped + 3, logging_steps=1)
    assert main([*more, "--resume"]) == 0
    log = json.loads((place / "out" / "training.json").read_text())
    before = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    assert log["history"][: len(before)] == before
    steps = [entry["step"] for entry in log["history"] if "loss" in entry]
    assert steps == list(range(1, stopped + 4))
    assert log["steps"] == stopped + 3
    assert (place / "out" / "posterior.json").is_file()


def test_bayesianise_gives_any_adapter_a_posterior(place, capsys):
    assert main(fitting(place, output="plain", method="mle")) == 0
    for name in ("posterior.json", "posterior.safetensors", "training.json"):
        (place / "plain" / name).unlink()  # what is left is stock PEFT
    making = [
        "bayesianise",
        str(place / "plain"),
        f"--anchor={place / 'train.jsonl'}",
        f"--output={place / 'spread'}",
    ]
    making += ["--anchors=4", "--draws=2", "--evaluations=3"]
    assert main(making) == 0  # the adapter's own configuration names its base
    assert "4 tried" in capsys.readouterr().out  # none, and three more
    reading = [
        f"--posterior={place / 'spread'}",
        f"--evaluation_data={place / 'test.jsonl'}",
        "--draws=[0,2]",
    ]
    assert main(["evaluate", *reading, "--resamples=20"]) == 0
    assert [record["method"] for record in read_records(place / "spread")] == ["tfb", "tfb"]
    assert "is not empty" in failed(making, capsys)
    making[1] = str(place / "model")
    assert "is no LoRA adapter" in failed(
        [*making, "--overwrite", f"--model={place / 'model'}"], capsys
    )


def test_a_post_hoc_method_takes_another_base(place):
    given = fitting(
        place, method="tfb", base="map", **{"tfb.anchors": 4, "tfb.draws": 2, "tfb.evaluations": 2}
    )
    assert main(given) == 0
    details = json.loads((place / "out" / "posterior.json").read_text())
    assert (details["method"], details["fields"]["base"]["method"]) == ("tfb", "map")


def test_an_encoder_is_fitted_and_asked_by_its_head(place, bert, byte_level, capsys):
    bert().save_pretrained(place / "model")
    byte_level.save_pretrained(place / "model")
    rows = [{"text": f"is it {i}?", "answer": i % 2} for i in range(8)]
    write_rows(place / "train.jsonl", rows)
    given = {
        "scoring": "head",
        "options": '["no", "yes"]',
        "method": "ensemble",
        "ensemble.size": 2,
    }
    assert main(fitting(place, **given)) == 0
    asked = write_rows(place / "ask.jsonl", [{"text": "is it 3?"}])
    answers = place / "answers.jsonl"
    reading = [
        f"--posterior={place / 'out'}",
        f"--input={asked}",
        '--options=["no", "yes"]',
        f"--output={answers}",
    ]
    assert main(["predict", *reading]) == 0
    (answer,) = read_json_lines(answers.read_text())
    assert sum(answer["probabilities"]) == pytest.approx(1)
    members = [
        out / "answers.jsonl" for out in (place / "out" / "member-0", place / "out" / "member-1")
    ]
    for file in members:
        asking = [
            f"--posterior={file.parent}",
            f"--input={asked}",
            '--options=["no", "yes"]',
            f"--output={file}",
        ]
        assert main(["predict", *asking]) == 0
    alone = [read_json_lines(file.read_text())[0]["probabilities"][0] for file in members]
    assert answer["probabilities"][0] == pytest.approx(sum(alone) / 2, abs=1e-6)
    assert "draws=0 means the mean, but Mixture has none" in failed(
        ["predict", *reading, "--draws=0", "--overwrite"], capsys
    )
