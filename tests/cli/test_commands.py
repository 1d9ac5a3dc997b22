import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Trainer

from bayestune.cli import main, parser
from bayestune.errors import Refusal
from bayestune.evaluation import read_records
from bayestune.training import Interrupted, newest_checkpoint
from running import (
    failed,
    fitting,
    furnish,
    own_rows,
    predicted,
    probabilities,
    read_rows,
    run,
    write_rows,
)

NOISY = {"learning_rate": 0.1, "blob.init_root_std": 0.7, "blob.prior_std": 1.0}


@pytest.fixture
def place(tmp_path, llama, byte_level):
    """A folder with rows and a model whose answers are not all alike."""
    return furnish(tmp_path, llama(initializer_range=0.3), byte_level)


def reading(place, command="evaluate", posterior="out"):
    rows = f"--evaluation_data={place / 'test.jsonl'}"
    quick = "--resamples=20"
    return [command, f"--posterior={place / posterior}", rows, quick]


def steps_of(folder):
    return json.loads((folder / "training.json").read_text())["steps"]


# Fit, evaluate, predict


def test_fit_and_evaluate(place, capsys):
    out = place / "out"
    run(*fitting(place, method="blob", scoring="text", **{"blob.final_std": 0.1}))
    files = {file.name for file in out.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "training.json"} <= files
    assert {"posterior.json", "posterior.safetensors"} <= files
    details = json.loads((out / "posterior.json").read_text())
    assert (details["method"], details["scoring"], details["train_rows"]) == ("blob", "text", 8)
    assert details["fields"]["final_std"] == 0.1
    assert steps_of(out) == 3

    run(*reading(place), "--draws=[0,2]")
    records = read_records(out)
    told = [(r["draws"], r["n"], r["task"], r["method"]) for r in records]
    assert told == [(0, 5, "test", "blob"), (2, 5, "test", "blob")]
    for record in records:
        accuracy = record["metrics"]["accuracy"]
        assert 0 <= accuracy["low"] <= accuracy["high"] <= 1
    table = capsys.readouterr().out
    assert "BLoB N=2" in table
    assert "NLL" in table

    run(*reading(place), "--draws=[1]", f"--output={place / 'apart'}")
    assert [record["draws"] for record in read_records(place / "apart")] == [1]
    assert read_records(out) == records


def test_predict_answers_row_by_row(place, capsys):
    run(*fitting(place, method="blob"))
    asked = write_rows(place / "ask.jsonl", [{"question": "what is red?"}, *own_rows(3)])
    options = ['--options=["yes", "no"]', "--draws=3"]
    lines = predicted(place, *options)
    given = [["yes", "no"], *(list(row["options"]) for row in own_rows(3))]
    assert [line["options"] for line in lines] == given
    assert [line["answer"] for line in lines] == [None, 0, 1, 2]
    for line in lines:
        assert len(line["probabilities"]) == len(line["options"])
        assert sum(line["probabilities"]) == pytest.approx(1)
        assert line["confidence"] == max(line["probabilities"])
        assert line["confidence"] == line["probabilities"][line["choice"]]

    command = ["predict", f"--posterior={place / 'out'}", f"--input={asked}", *options]
    capsys.readouterr()
    run(*command)
    assert [json.loads(text) for text in capsys.readouterr().out.split("\n") if text] == lines
    answers = place / "answers.jsonl"
    said = failed([*command, "--draws=1", f"--output={answers}"], capsys)
    assert "is there already: choose another --output, or give --overwrite" in said
    assert read_rows(answers) == lines


def test_a_shared_prefix_is_told_and_changes_the_predictive(place, capsys):
    run(*fitting(place, **NOISY))
    run(*reading(place), "--draws=[0,2]", "--shared_prefix=3")
    assert "BLoB N=2, prefix 3" in capsys.readouterr().out
    run(*reading(place), "--draws=[2]")
    records = read_records(place / "out")
    labels = ["BLoB N=0", "BLoB N=2, prefix 3", "BLoB N=2"]
    assert [r["label"] for r in records] == labels
    assert [r["config"]["predicting"]["shared_prefix"] for r in records] == [3, 3, None]
    _, prefixed, plain = [record["metrics"]["nll"]["value"] for record in records]
    assert prefixed != pytest.approx(plain, abs=1e-6)
    shared = predicted(place, "--draws=2", "--shared_prefix=3")
    exact = predicted(place, "--draws=2")
    assert probabilities(shared) != pytest.approx(probabilities(exact), abs=1e-4)


def test_rows_that_are_decided_are_drawn_no_more(place, capsys):
    run(*fitting(place, **{**NOISY, "blob.init_root_std": 0.05, "blob.final_std": 0.02}))
    every = predicted(place, "--draws=9")
    decided = predicted(place, "--draws=9", "--decided")
    assert [row["choice"] for row in decided] == [row["choice"] for row in every]
    assert not any("draws" in row for row in every)
    assert 5 <= min(row["draws"] for row in decided) < 9
    command = ["predict", f"--posterior={place / 'out'}", f"--input={place / 'ask.jsonl'}"]
    said = failed([*command, "--draws=0", "--decided"], capsys)
    assert "too few draws: got most=0, round_size=2, expected 1 or more" in said


# Compare


def test_compare_writes_a_report_and_resumes(place, capsys):
    out = place / "out"
    given = {"evaluation_data": place / "test.jsonl", "draws": "[0,2]", "resamples": 20}
    comparing = fitting(place, "compare", **given)
    run(*comparing)
    records = read_records(out)
    told = [(record["method"], record["draws"]) for record in records]
    assert told == [("mle", 0), ("blob", 0), ("blob", 2)]
    assert [record["label"] for record in records] == ["MLE", "BLoB N=0", "BLoB N=2"]
    assert all((out / record["predictions"]).is_file() for record in records)
    files = {file.name for file in out.iterdir()}
    assert {"table.md", "summary.png", "report.html", "mle", "blob"} <= files
    table = (out / "table.md").read_text()
    assert all(record["label"] in table for record in records)

    assert "is not empty: choose another --output" in failed(comparing, capsys)
    assert read_records(out) == records
    (out / "records.jsonl").write_text(json.dumps(records[0]) + "\n")
    run(*comparing, "--resume")
    again = read_records(out)
    assert again[0] == records[0]
    assert [(record["method"], record["draws"]) for record in again] == told
    for now, before in zip(again, records, strict=True):
        nll = before["metrics"]["nll"]["value"]
        assert now["metrics"]["nll"]["value"] == pytest.approx(nll, abs=1e-6)
        # of the saved posterior, which is not fitted again
        assert now["seconds"]["fit"] == before["seconds"]["fit"]


def test_report_shows_the_runs_of_any_folders(place, capsys):
    given = {"evaluation_data": place / "test.jsonl", "draws": "[0,2]", "resamples": 20}
    run(*fitting(place, "compare", **given, logging_steps=1))
    records = read_records(place / "out")
    assert all("fit" in record for record in records)
    course = records[-1]["fit"]
    assert [line["step"] for line in course["history"]] == [1, 2, 3]
    assert all(line["kl"] > 0 for line in course["history"])
    assert min(course["std"].values()) > 0
    assert course["prior_std"] > 0
    made = page_data(place / "out/report.html")
    assert made["command"].startswith("bayestune compare --model=")
    assert [run["name"] for run in made["runs"]] == ["MLE", "BLoB N=0", "BLoB N=2"]
    assert made["runs"][2]["fit"]["slots"]
    assert [one["draws"] for one in made["fits"][0]["prefixes"]] == [1, 2]
    run(*fitting(place, method="mle", output="one"))
    run(*reading(place, posterior="one"))
    run("report", place / "out", place / "one/records.jsonl", "--to", place / "more/all.html")
    both = page_data(place / "more/all.html")
    assert len(both["runs"]) == 4
    assert "more/all.html" in both["command"]
    run("report", place, "--to", place / "all.html", "--title=Mine")  # folders of results
    again = page_data(place / "all.html")
    assert (again["title"], len(again["runs"])) == ("Mine", 4)
    said = failed(["report", place / "model", "--to", place / "a.html"], capsys)
    assert "expected a folder of `bench`, `compare` or `evaluate`" in said
    said = failed(["report", place / "out", "--to", place / "out/records.jsonl"], capsys)
    assert "is no page: expected a file that ends in .html" in said
    assert read_records(place / "out") == records


def page_data(path):
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_compare_goes_on_where_evaluate_has_written(place):
    run(*fitting(place, method="mle", output="fit"))
    evaluating = reading(place, posterior="fit")
    run(*evaluating, f"--output={place / 'out'}")
    more = {"methods": "[blob]", "draws": "[2]", "resamples": 20}
    run(*fitting(place, "compare", evaluation_data=place / "test.jsonl", **more), "--resume")
    records = read_records(place / "out")
    assert [record["label"] for record in records] == ["MLE", "BLoB N=2"]
    assert all(record["seconds"]["fit"] > 0 for record in records)
    assert (place / "out/report.html").is_file()


@pytest.mark.parametrize("command", ["fit", "compare"])
def test_a_base_that_was_trained_in_place_is_another_one(place, capsys, command):
    rows = {"evaluation_data": place / "test.jsonl"} if command == "compare" else {}
    own = {"methods": "[mle]"} if command == "compare" else {"method": "mle"}
    arguments = fitting(place, command, **rows, **own)
    run(*arguments)
    run(*arguments, "--resume")
    file = place / "model/model.safetensors"
    weights = {name: value + 0.01 for name, value in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    said = failed([*arguments, "--resume"], capsys)
    assert "started with other settings; the weights of --model: got" in said


def test_rows_that_repeat_or_contradict_others_are_told(place, caplog):
    train = read_rows(place / "train.jsonl")
    first = train[0]
    turned = {**first, "options": first["options"][::-1]}  # the same index is another answer
    write_rows(place / "train.jsonl", [*train, turned])
    run(*fitting(place, method="mle"))
    said = f"2 of the {len(train) + 1} training rows have a content that others have with another"
    assert said in caplog.text
    assert "rows to evaluate on" not in caplog.text
    test = read_rows(place / "test.jsonl")
    write_rows(place / "test.jsonl", [*test, test[0], test[0]])
    run(*reading(place))
    said = f"2 of the {len(test) + 2} rows to evaluate on repeat the content of others: intervals"
    assert said in caplog.text
    assert caplog.text.count("with another answer") == 1


def test_compare_on_rows_held_out_of_train(place, capsys):
    comparing = fitting(place, "compare", methods="[mle]", on="held_out", resamples=20)
    said = failed(comparing, capsys)
    assert "no rows to evaluate on in 'held_out' of train: got none, expected some" in said
    run(*comparing, "--holdout=0.25")
    (record,) = read_records(place / "out")
    assert (record["n"], record["train_rows"], record["rows"]) == (2, 6, "held_out")


# What is refused


def test_output_is_only_overwritten_when_told_to(place, capsys):
    out = place / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    said = failed(fitting(place), capsys)
    assert "is not empty: choose another --output, or give --overwrite" in said
    assert (out / "notes.txt").read_text() == "mine"
    run(*fitting(place), "--overwrite")
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "posterior.json").is_file()


@pytest.mark.parametrize("method", ["mle", "ensemble"])
def test_a_run_whose_first_step_fails_is_in_nobodys_way(place, capsys, monkeypatch, method):
    def fails(*_, **__):
        raise Refusal("not this")

    with monkeypatch.context() as changed:
        changed.setattr(Trainer, "training_step", fails)
        assert "not this" in failed(fitting(place, method=method), capsys)
    run(*fitting(place, seed=2, method=method))
    assert (place / "out/posterior.json").is_file()
    assert "is not empty" in failed(fitting(place, method=method), capsys)


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ({"model": "/no/such"}, "unknown model '/no/such': no such directory"),
        ({"task": "arc"}, "unknown task: got 'arc', expected one of ['arc_challenge'"),
        ({"method": "sgd"}, "unknown method: got 'sgd', expected one of ['bbb', 'blob'"),
        ({"data": "-"}, "no such file: -"),
    ],
)
def test_a_mistake_is_told_and_never_costs_the_old_output(place, capsys, mistake, said):
    out = place / "out"
    out.mkdir()
    (out / "posterior.json").write_text("old")
    arguments = fitting(place, **mistake)
    if "task" in mistake:
        arguments = [a for a in arguments if not a.startswith("--data=")]
    assert said in failed([*arguments, "--overwrite"], capsys)
    assert (out / "posterior.json").read_text() == "old"


def test_bad_rows_are_told_by_file_and_line(place, capsys):
    good = own_rows(2)
    bad = {
        "row train.jsonl:3: no column 'question' or 'text'; got the columns ['answer', 'que": [
            *good,
            {"questions": "?", "answer": 0},
        ],
        "'pink' is not among": [{**row, "answer": "pink"} for row in good],
        "got one class, expected two or more": [{**row, "answer": 0} for row in good],
    }
    for said, rows in bad.items():
        write_rows(place / "train.jsonl", rows)
        assert said in failed(fitting(place), capsys)


def test_a_plain_adapter_is_neither_a_posterior_nor_a_model(place, capsys):
    out = place / "out"
    run(*fitting(place, method="mle"))
    (out / "posterior.json").unlink()
    said = "out is not a posterior: got a plain LoRA adapter without posterior.json"
    asking = ["predict", f"--posterior={out}", f"--input={place / 'ask.jsonl'}"]
    assert said in failed(reading(place), capsys)
    assert said in failed(asking, capsys)
    said = failed(fitting(place, model=out, output="next"), capsys)
    assert "is an adapter (it has adapter_config.json)" in said
    shutil.rmtree(out)
    assert "is not a posterior: got no adapter" in failed(reading(place), capsys)


def test_a_posterior_without_a_mean_says_so(place, capsys):
    run(*fitting(place, method="ensemble", base="blob", **{"ensemble.size": 2}))
    details = json.loads((place / "out" / "posterior.json").read_text())
    assert (details["method"], details["fields"]["base"]["method"]) == ("ensemble", "blob")
    said = failed([*reading(place), "--draws=[0]"], capsys)
    assert "Mixture has no mean: got draws=0, which asks for it, expected 1 or more" in said
    command = ["predict", f"--posterior={place / 'out'}", f"--input={place / 'ask.jsonl'}"]
    assert "Mixture has no mean" in failed([*command, "--draws=0"], capsys)


def test_a_missing_library_is_told_in_a_line(place, capsys, monkeypatch):
    def missing(*_, **__):
        raise ImportError("got a GGUF model, expected gguf to be installed")

    monkeypatch.setattr("bayestune.session.opened_model.load_model", missing)
    said = failed(fitting(place), capsys)
    assert said == "bayestune: error: got a GGUF model, expected gguf to be installed"


# Ctrl-C


@pytest.mark.parametrize(
    "interrupt", [KeyboardInterrupt(), Interrupted("stopped at step 7; go on with --resume")]
)
def test_ctrl_c_is_exit_code_130(monkeypatch, capsys, interrupt):
    def interrupted(_):
        raise interrupt

    _, options = parser.COMMANDS["predict"]
    capsys.readouterr()
    monkeypatch.setitem(parser.COMMANDS, "predict", (interrupted, options))
    assert main(["predict", "--posterior=a", "--input=b"]) == 130
    assert capsys.readouterr().err == f"bayestune: {str(interrupt) or 'interrupted'}\n"


def wait_for(stream, pattern):
    seen = b""
    while not re.search(pattern, seen):
        byte = stream.read(1)
        assert byte, seen.decode()
        seen += byte


def test_ctrl_c_leaves_a_checkpoint_that_resume_goes_on_from(place, capsys):
    out = place / "out"
    command = fitting(place, method="blob", steps=100_000, progress="true", logging_steps=1)
    with subprocess.Popen(
        [sys.executable, "-m", "bayestune", *command],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    ) as process:
        wait_for(process.stderr, rb"step [1-9]\d* of 100000")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    said = re.search(r"bayestune: stopped at step (\d+); go on with --resume", errors.decode())
    stopped = int(said[1])
    checkpoint = newest_checkpoint(out / "checkpoints")
    assert checkpoint.name == f"checkpoint-{stopped}"
    with safe_open(checkpoint / "adapter_model.safetensors", "pt") as tensors:
        assert len(list(tensors.keys())) > 0
    assert not (out / "posterior.json").exists()

    other = fitting(place, method="blob", steps=stopped + 3, logging_steps=1)
    said = failed([*other, "--resume"], capsys)
    assert f"steps: got {stopped + 3}, the run has 100000" in said
    noted = json.loads((out / "run.json").read_text())
    noted["settings"]["steps"] = stopped + 3  # as if it had been begun with fewer
    (out / "run.json").write_text(json.dumps(noted))
    run(*other, "--resume")
    log = json.loads((out / "training.json").read_text())
    before = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    assert log["history"][: len(before)] == before
    steps = [entry["step"] for entry in log["history"] if "loss" in entry]
    assert steps == list(range(1, stopped + 4))
    assert log["steps"] == stopped + 3
    assert (out / "posterior.json").is_file()


# Methods on top of others, and heads


def test_bayesianise_gives_any_adapter_a_posterior(place, capsys):
    run(*fitting(place, output="plain", method="mle"))
    for name in ("posterior.json", "posterior.safetensors", "training.json"):
        (place / "plain" / name).unlink()  # what is left is stock PEFT
    anchor = f"--anchor={place / 'train.jsonl'}"
    making = ["bayesianise", place / "plain", anchor, f"--output={place / 'spread'}"]
    making += ["--anchors=4", "--draws=2", "--evaluations=3"]
    run(*making)  # the adapter's own configuration names its base
    assert "4 tried" in capsys.readouterr().out  # none, and three more
    run(*reading(place, posterior="spread"), "--draws=[0,2]")
    records = read_records(place / "spread")
    assert [(r["method"], r["label"]) for r in records] == [("tfb", "TFB N=0"), ("tfb", "TFB N=2")]
    assert "is not empty" in failed(making, capsys)
    making[1] = place / "model"
    said = failed([*making, "--overwrite", f"--model={place / 'model'}"], capsys)
    assert "is not a LoRA adapter" in said


def test_an_ensemble_of_encoders_is_averaged(place, bert, byte_level):
    bert().save_pretrained(place / "model")
    rows = [{"text": f"is it {i}?", "answer": i % 2} for i in range(8)]
    write_rows(place / "train.jsonl", rows)
    write_rows(place / "ask.jsonl", [{"text": "is it 3?"}])
    options = '["no", "yes"]'
    given = {"scoring": "head", "options": options, "method": "ensemble", "ensemble.size": 2}
    run(*fitting(place, **given))
    (answer,) = predicted(place, f"--options={options}")
    members = [
        predicted(place, f"--options={options}", posterior=f"out/member-{i}") for i in (0, 1)
    ]
    alone = [member[0]["probabilities"][0] for member in members]
    assert answer["probabilities"][0] == pytest.approx(sum(alone) / 2, abs=1e-6)
    assert alone[0] != pytest.approx(alone[1], abs=1e-6)
