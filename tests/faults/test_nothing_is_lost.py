"""What a user has stays: other files, the old run, finished rows, the time of the first fits."""

import io
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForSequenceClassification

from bayestune.adapters import Lora
from bayestune.bench import run_bench
from bayestune.cli import main, output_folder
from bayestune.errors import Refusal
from bayestune.evaluation import read_records
from bayestune.models import load_model
from bayestune.session import Session
from bayestune.training import NotFiniteError, Training, newest_checkpoint
from bayestune.training.callbacks import FiniteLoss, StopOnSignal, Terminated
from bayestune.whole_files import whole_lines
from benching import furnish as furnish_grid
from benching import small
from running import failed, fitting, furnish, own_rows, predicted, read_rows, run, write_rows
from tiny import SIZES


@pytest.fixture
def place(tmp_path, llama, byte_level):
    """A folder with rows and a model whose answers are not all alike."""
    return furnish(tmp_path, llama(initializer_range=0.3), byte_level)


@pytest.fixture
def fitted(place):
    """The same with a posterior in `out`."""
    run(*fitting(place, method="mle"))
    return place


def asking(place, *more, posterior="out"):
    rows = f"--input={place / 'ask.jsonl'}"
    return ["predict", f"--posterior={place / posterior}", rows, "--draws=2", *more]


@pytest.fixture
def breaks(monkeypatch):
    """Training ends with an error in its second step."""

    def record(self, loss, state, args):
        if state.global_step:
            raise NotFiniteError("the loss is nan")

    monkeypatch.setattr(FiniteLoss, "record", record)


# --overwrite


def files_of(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", ["fit", "compare"])
def test_what_is_not_ours_is_spared(place, command):
    given = {}
    if command == "compare":
        given = {"methods": "[mle]", "evaluation_data": place / "test.jsonl", "resamples": 5}
    fit = fitting(place, command, save_steps=1, **given)
    run(*fit)
    out = place / "out"
    mine = ["notes.txt", ".git/HEAD", "checkpoints/mine.txt", "data/train.jsonl", "mle/thoughts.md"]
    for name in mine:
        (out / name).parent.mkdir(exist_ok=True, parents=True)
        (out / name).write_text("years of work")
    before = files_of(out)
    run(*fit, "--overwrite")
    assert files_of(out) == before
    assert all((out / name).read_text() == "years of work" for name in mine)
    assert not (out / output_folder.UNFINISHED).exists()


def test_files_that_only_have_our_names_are_refused(place, capsys):
    out = place / "out"
    out.mkdir()
    (out / "table.md").write_text("mine")
    (out / "records.jsonl").write_text('{"patient": 1}\n')
    said = failed([*fitting(place), "--overwrite"], capsys)
    assert "was not written by bayestune, but has files of the same names" in said
    assert "['records.jsonl', 'table.md']" in said


@pytest.mark.parametrize("where", [".", "..", "~", "/"])
def test_precious_folders_are_refused(place, capsys, monkeypatch, where):
    home = place / "home"
    (home / "project" / "src").mkdir(parents=True)
    (home / "project" / "thesis.tex").write_text("years of work")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / "project" / "src")
    output = home if where == "~" else where
    (home / "project" / "src" / "main.tex").write_text("work")
    said = failed([*fitting(place, output=output), "--overwrite"], capsys)
    assert "is the current folder or holds it" in said or "is the home folder or holds it" in said


@pytest.mark.parametrize("option", ["data", "model", "config"])
def test_a_folder_that_holds_an_input_is_refused(place, capsys, option):
    out = place / "out"
    out.mkdir()
    if option == "model":
        (place / "model").rename(out / "model")
        given = {"model": out / "model"}
    elif option == "data":
        (place / "train.jsonl").rename(out / "train.jsonl")
        given = {"data": out / "train.jsonl"}
    else:
        (out / "own.yaml").write_text("steps: 3\n")
        given = {"config": out / "own.yaml"}
    before = files_of(out)
    said = failed([*fitting(place, **given), "--overwrite"], capsys)
    assert f"holds an input, --{option}" in said
    assert files_of(out) == before


def test_the_old_posterior_is_there_until_the_new_one_is(fitted, capsys, breaks):
    before = predicted(fitted)
    again = fitting(fitted, method="ensemble", **{"ensemble.size": 2, "learning_rate": 0.1})
    assert "the loss is nan" in failed([*again, "--overwrite"], capsys)
    assert predicted(fitted) == before


def test_a_new_posterior_of_another_family_leaves_nothing_of_the_old(fitted):
    run(*fitting(fitted, method="ensemble", **{"ensemble.size": 2}), "--overwrite")
    out = fitted / "out"
    assert "adapter_model.safetensors" not in {path.name for path in out.iterdir()}
    assert json.loads((out / "posterior.json").read_text())["members"]
    run(*fitting(fitted, method="mle"), "--overwrite")
    assert not list(out.glob("member-*"))
    assert predicted(fitted)


def test_a_refit_that_was_cut_off_is_resumed(fitted, capsys, monkeypatch, breaks):
    again = fitting(fitted, method="mle", learning_rate=0.1, save_steps=1)
    failed([*again, "--overwrite"], capsys)
    monkeypatch.undo()
    said = failed([*fitting(fitted, method="mle", learning_rate=0.2), "--resume"], capsys)
    assert "learning_rate: got 0.2, the run has 0.1" in said
    run(*again, "--resume")
    out = fitted / "out"
    assert json.loads((out / "posterior.json").read_text())["training"]["learning_rate"] == 0.1
    assert not (out / ".unfinished").exists()


def test_both_flags_at_once_are_refused(fitted, capsys):
    said = failed([*fitting(fitted), "--overwrite", "--resume"], capsys)
    assert "got both --overwrite and --resume, expected one" in said


# Links, mounts, places that cannot be written


@pytest.mark.parametrize("inside", [(), ("lost+found",)])
def test_linked_and_mounted_folders_are_written_to_and_stay(place, inside):
    volume = place / "volume"
    volume.mkdir()
    for name in inside:
        (volume / name).mkdir()
    (place / "out").symlink_to(volume)
    run(*fitting(place, method="mle"))
    number = volume.stat().st_ino
    run(*fitting(place, method="mle"), "--overwrite")
    assert (place / "out").is_symlink()
    assert volume.stat().st_ino == number
    assert (volume / "posterior.json").is_file()


def test_an_output_that_cannot_be_is_told_before_the_model_is_loaded(place, capsys, monkeypatch):
    monkeypatch.setattr(Session, "open", None)
    (place / "dangling").symlink_to(place / "nowhere")
    said = failed(fitting(place, output="dangling"), capsys)
    assert "is a link to" in said
    said = failed(fitting(place, output="train.jsonl/out"), capsys)
    assert "cannot be a folder" in said
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "cannot write to" in failed(fitting(place, output="new"), capsys)


# --resume


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 4}, "steps: got 4, the run has 3"),
        ({"seed": 9}, "seed: got 9, the run has 1"),
        ({"lora.rank": 4}, "lora.rank: got 4, the run has 2"),
        ({"method": "blob"}, "method: got 'blob', the run has 'mle'"),
        ({"scoring": "text"}, "scoring: got 'text', the run has 'letter'"),
        ({"data": "test.jsonl"}, "the rows of --data: got '5 rows, "),
        ({"model": "other"}, "model: got 'other', the run has 'model'"),
    ],
)
def test_a_run_with_other_settings_is_not_resumed(fitted, capsys, changes, said):
    paths = {name: fitted / value for name, value in changes.items() if name in ("data", "model")}
    (fitted / "other").symlink_to(fitted / "model")
    told = failed([*fitting(fitted, **{"method": "mle", **changes, **paths}), "--resume"], capsys)
    assert said in told
    assert "give those of the run, or choose another --output" in told


def test_the_same_run_is_finished_already_wherever_its_rows_lie_now(fitted, capsys):
    (fitted / "train.jsonl").rename(fitted / "moved.jsonl")
    more = {"data": fitted / "moved.jsonl", "logging_steps": 7}
    run(*fitting(fitted, method="mle", **more), "--resume")
    assert "finished already" in capsys.readouterr().out


def test_a_comparison_takes_further_methods_but_no_other_rows(place, capsys):
    given = {"evaluation_data": place / "test.jsonl", "resamples": 20, "draws": "[0]"}
    run(*fitting(place, "compare", methods="[mle]", **given))
    run(*fitting(place, "compare", methods="[mle,map]", **given), "--resume")
    assert [record["method"] for record in read_records(place / "out")] == ["mle", "map"]
    given["evaluation_data"] = place / "ask.jsonl"
    said = failed([*fitting(place, "compare", methods="[mle]", **given), "--resume"], capsys)
    assert "the rows of --evaluation_data: got '7 rows" in said


# predict


def test_rows_are_written_as_they_come_and_gone_on_with(fitted, capsys, monkeypatch):
    monkeypatch.setattr("bayestune.session.row_predictor.WINDOW", 2)
    whole = predicted(fitted, "--draws=2")
    answers = fitted / "some.jsonl"
    command = asking(fitted, f"--output={answers}")
    predict = Session.predict
    calls = []

    def cut(self, *given, **named):
        calls.append(named["rows"])
        if len(calls) == 3:
            assert read_rows(answers) == whole[:4]
            raise KeyboardInterrupt
        return predict(self, *given, **named)

    monkeypatch.setattr(Session, "predict", cut)
    assert main(command) == 130
    with answers.open("ab") as file:
        file.write(b'{"id": "ask.jsonl:5", "quest')  # as a kill leaves it
    assert "or --resume to go on" in failed(command, capsys)
    said = failed([*command, "--resume", "--draw_seed=3"], capsys)
    assert "draw_seed: got 3, the run has 0" in said
    run(*command, "--resume")
    assert [len(rows) for rows in calls] == [2, 2, 2, 2, 1]
    assert read_rows(answers) == whole
    run(*command, "--resume")
    assert read_rows(answers) == whole
    write_rows(fitted / "ask.jsonl", own_rows(8, start=1))
    assert "answers row 'ask.jsonl:1'" in failed([*command, "--resume"], capsys)


def test_answers_about_other_contexts_are_not_gone_on_with(place, capsys):
    def contexts(count, text):
        return [{**row, "context": f"{text} {i}"} for i, row in enumerate(own_rows(count))]

    write_rows(place / "train.jsonl", contexts(8, "the sky"))
    run(*fitting(place, method="mle"))
    answers = place / "some.jsonl"
    command = asking(place, f"--output={answers}")
    write_rows(place / "ask.jsonl", contexts(4, "green"))
    run(*command)
    whole = read_rows(answers)
    write_rows(answers, whole[:2])
    write_rows(place / "ask.jsonl", contexts(4, "blue"))
    said = failed([*command, "--resume"], capsys)
    assert "the texts of the rows, contexts among them: got" in said
    write_rows(place / "ask.jsonl", contexts(6, "green"))  # rows that are added are no other rows
    run(*command, "--resume")
    assert read_rows(answers)[:4] == whole
    write_rows(place / "ask.jsonl", [*contexts(5, "green"), *contexts(6, "blue")[5:]])
    assert "the texts of the rows" in failed([*command, "--resume"], capsys)


def test_old_answers_stay_until_the_new_ones_are_whole(fitted, monkeypatch):
    before = predicted(fitted)

    def cut(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Session, "predict", cut)
        answers = f"--output={fitted / 'answers.jsonl'}"
        assert main(asking(fitted, answers, "--overwrite")) == 130
    assert read_rows(fitted / "answers.jsonl") == before


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("ask.jsonl", "is an input, --rows"),
        ("out/posterior.json", "is an input, --posterior"),
        ("out", "is a folder: expected a file"),
        ("train.jsonl/answers.jsonl", "cannot be a folder"),
    ],
)
def test_answers_go_where_they_can_before_the_work(fitted, capsys, monkeypatch, output, said):
    monkeypatch.setattr(Session, "of_posterior", None)
    before = (fitted / "ask.jsonl").read_text()
    assert said in failed(asking(fitted, f"--output={fitted / output}", "--overwrite"), capsys)
    assert (fitted / "ask.jsonl").read_text() == before


def test_a_missing_folder_of_the_answers_is_made(fitted):
    run(*asking(fitted, f"--output={fitted / 'not/there/answers.jsonl'}"))
    assert len(read_rows(fitted / "not/there/answers.jsonl")) == 7


BAD = {
    "too long": {"question": "what is red " * 200, "options": ["red", "green"]},
    "one option": {"question": "what is red?", "options": ["red"]},
    "no question": {"options": ["red", "green"]},
    "more options than letters": {"question": "?", "options": [f"o{i}" for i in range(30)]},
}


@pytest.mark.parametrize("kind", BAD)
def test_a_row_that_cannot_be_put_is_marked_and_the_others_go_on(fitted, caplog, kind):
    good = own_rows(4)
    expected = predicted(fitted, "--draws=2")[:4]
    write_rows(fitted / "ask.jsonl", [*good[:2], BAD[kind], *good[2:]])
    first, second, bad, third, fourth = predicted(fitted, "--draws=2")
    assert bad["id"] == "ask.jsonl:3"
    assert bad["error"].startswith("row ") or "label" in bad["error"]
    assert "probabilities" not in bad
    for one, other in zip([first, second, third, fourth], expected, strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-6)
    assert "1 of 5 rows could not be put or predicted, see their error" in caplog.text


@pytest.fixture
def overflowing(place, byte_level):
    """A fit on a model that overflows where it reads a z, which no training row has."""
    path = place / "model" / "model.safetensors"
    weights = load_file(path)
    weights["model.embed_tokens.weight"][byte_level("z")["input_ids"]] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    run(*fitting(place, method="mle"))
    return place


def asked_about(*words):
    return [{"question": f"is {word}?", "options": ["red", "green"], "answer": 0} for word in words]


@pytest.mark.parametrize("more", [[], ["--decided"], ["--draws=0"]])
def test_a_row_whose_logits_are_no_numbers_is_marked_and_the_others_go_on(
    overflowing, caplog, more
):
    write_rows(overflowing / "ask.jsonl", asked_about("blue", "grass", "a z", "the sky"))
    found = predicted(overflowing, "--draws=2", *more)
    assert "got logits with NaN" in found[2]["error"]
    assert ["choice" in line for line in found] == [True, True, False, True]
    assert "1 of 4 rows could not be put or predicted, see their error" in caplog.text


def test_rows_without_any_number_are_no_success(overflowing, capsys):
    rows = write_rows(overflowing / "ask.jsonl", asked_about("z", "a z"))
    evaluating = ["evaluate", f"--posterior={overflowing / 'out'}", f"--evaluation_data={rows}"]
    output = f"--output={overflowing / 'answers.jsonl'}"
    for command in (asking(overflowing, output), evaluating):
        assert "got logits with NaN" in failed(command, capsys)


def test_a_line_that_is_no_json_is_marked(fitted):
    with (fitted / "ask.jsonl").open("a") as file:
        file.write("{broken\n")
    *good, bad = predicted(fitted)
    assert len(good) == 7
    assert "ask.jsonl, line 8: not a JSON object" in bad["error"]


def test_rows_none_of_which_can_be_put_are_refused(fitted, capsys):
    write_rows(fitted / "ask.jsonl", [BAD["too long"]] * 2)
    assert "max_length=300" in failed(asking(fitted), capsys)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_rows_come_through_standard_input(fitted, capsys, monkeypatch, kind):
    text = (fitted / "ask.jsonl").read_text()
    if kind == "csv":
        text = "question,options\nwhat is grün?,red|green\nwhat is red?,red|green\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    capsys.readouterr()
    run("predict", f"--posterior={fitted / 'out'}", "--input=-", "--draws=0")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == {"jsonl": 7, "csv": 2}[kind]
    for line in lines:
        assert line["choice_text"] == line["options"][line["choice"]]


def test_a_cut_last_line_is_taken_off_and_others_are_told(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "gr\xc3')
    assert whole_lines(path) == [{"a": 1}]
    assert path.read_bytes() == b'{"a": 1}\n'
    path.write_bytes(b'{"a": 1}\n{"a": \n{"a": 2}\n')
    with pytest.raises(Refusal, match="rows.jsonl, line 2: not a JSON object"):
        whole_lines(path)


# Checks before the first fit


@pytest.fixture
def never_fitted(monkeypatch):
    def fit(*_, **__):
        raise AssertionError("fitted")

    monkeypatch.setattr(Session, "fit", fit)


LONG = {"question": "what is red " * 200, "options": ["red", "green"], "answer": 0}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methods": "[mle,sgd]"}, "unknown method: got 'sgd'"),
        ({"methods": "[mle,temperature]"}, "Temperature chooses on held-out rows: got none"),
        ({"methods": "[mle,laplace]", "base": "ensemble"}, "Laplace builds on a point: got a Mix"),
        ({"methods": "[mle,tfb]", "base": "ensemble"}, "TFB starts from one adapter: got a Mix"),
        ({"methods": "[mle,posterior_scale]", "base": "map", "holdout": 0.25}, "scales a Gaussian"),
        ({"lora.targets": "[nothing]"}, "no module to adapt: got targets ['nothing']"),
        ({"evaluation_data": "long.jsonl"}, "take more than max_length=300 tokens"),
        ({"evaluation_data": "none.jsonl"}, "no such file"),
        ({"blob.prior_std": "wide"}, "--blob.prior_std: got 'wide', expected a number"),
    ],
)
def test_a_comparison_is_checked_whole(place, capsys, never_fitted, changes, said):
    write_rows(place / "long.jsonl", [*own_rows(3), LONG])
    given = {"evaluation_data": "test.jsonl", "resamples": 20, **changes}
    given["evaluation_data"] = place / given["evaluation_data"]
    command = fitting(place, "compare", **given)
    try:
        told = failed(command, capsys)
    except SystemExit:
        told = capsys.readouterr().err
    assert said in told
    assert not (place / "out").exists()


@pytest.mark.parametrize("wrong", ["model", "rows", "base", "targets"])
def test_a_grid_is_checked_whole(tmp_path, llama, byte_level, never_fitted, wrong):
    place = furnish_grid(tmp_path, llama(), byte_level)
    said = {
        "model": ({"models": (str(place / "model"), "/no/such")}, "unknown model '/no/such'"),
        "base": (
            {"methods": {"mle": None, "laplace": {"base": "ensemble"}}},
            "Laplace builds on a point: got a Mixture from its base",
        ),
        "targets": (
            {"training": Training(Lora(targets=("no",)))},
            r"got targets \['no'\]",
        ),
        "rows": ({}, "take more than max_length=300"),
    }
    if wrong == "rows":
        write_rows(place / "test.jsonl", [LONG])
    changes, match = said[wrong]
    with pytest.raises((ValueError, OSError), match=match):
        run_bench(small(place, **changes), place / "out")


def test_rows_longer_than_a_table_of_positions_are_told(tmp_path, bert, byte_level, capsys):
    place = furnish(tmp_path, bert(max_position_embeddings=20), byte_level)
    rows = [
        {**row, "options": ["red", "green"], "answer": i % 2} for i, row in enumerate(own_rows(8))
    ]
    rows[5]["question"] = "what is red and green and blue " * 9
    write_rows(place / "train.jsonl", rows)
    said = failed(fitting(place, scoring="head"), capsys)
    assert "expected at most 20, the places that BertForSequenceClassification has" in said


# SIGTERM


def test_sigterm_writes_a_checkpoint_as_ctrl_c_does(place, monkeypatch, capsys):
    saved = place / "out" / "checkpoints"
    record = FiniteLoss.record

    def terminated(self, loss, state, args):
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        record(self, loss, state, args)

    monkeypatch.setattr(FiniteLoss, "record", terminated)
    before = signal.getsignal(signal.SIGTERM)
    assert main(fitting(place, method="mle")) == 143
    assert "stopped at step 2; go on with --resume" in capsys.readouterr().err
    assert newest_checkpoint(saved).name == "checkpoint-2"
    assert signal.getsignal(signal.SIGTERM) == before
    monkeypatch.undo()
    run(*fitting(place, method="mle"), "--resume")
    assert (place / "out" / "posterior.json").is_file()


def test_signals_are_given_back_however_training_ends():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ZeroDivisionError), StopOnSignal():
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    with StopOnSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Terminated, match="stopped at step 7"):
            stop.raise_if_stopped(7)


# Models


def test_relative_paths_of_models_work_from_anywhere(place, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(place)
    run(*fitting(place, method="mle", model="model"))
    config = json.loads((place / "out" / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]) == place / "model"
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert len(predicted(place)) == 7


@pytest.mark.parametrize("pad", [None, 5])
def test_a_head_on_a_decoder_finds_the_last_token_by_the_tokenizers_pad(tmp_path, byte_level, pad):
    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZES, "pad_token_id": pad}, num_labels=2)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    byte_level.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), num_labels=2)
    texts = ["what is red?", "what is red and green and blue?"]
    batch = loaded.tokenizer(texts, padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    together = loaded.model(**batch).logits[0]
    alone = loaded.model(input_ids=batch["input_ids"][:1, : int(batch["attention_mask"][0].sum())])
    torch.testing.assert_close(together, alone.logits[0])


# Records and modes


def test_a_second_evaluation_is_the_first_again(fitted):
    evaluating = [
        "evaluate",
        f"--posterior={fitted / 'out'}",
        f"--evaluation_data={fitted / 'test.jsonl'}",
        "--resamples=20",
    ]
    run(*evaluating)
    run(*evaluating)
    assert len(read_records(fitted / "out")) == 1
    run(*evaluating, "--bins=5")
    assert len(read_records(fitted / "out")) == 2


def test_checkpoints_have_the_modes_that_the_umask_asks_for(place):
    mask = os.umask(0o027)
    try:
        run(*fitting(place, method="mle", save_steps=2))
    finally:
        os.umask(mask)
    files = [path for path in (place / "out" / "checkpoints").rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}


def test_no_space_is_told_with_what_is_kept(fitted, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "answers.jsonl")

    monkeypatch.setattr(Session, "predict", full)
    said = failed(asking(fitted, f"--output={fitted / 'answers.jsonl'}"), capsys)
    assert "no space left for answers.jsonl" in said
    assert "a run goes on with --resume" in said


def test_a_grid_file_is_checked_from_the_command_line_too(place, capsys, never_fitted):
    rows = {"data": f"{place}/train.jsonl", "evaluation_data": f"{place}/test.jsonl"}
    settings = {
        "models": [str(place / "model")],
        "tasks": {"one": {"questions": rows}},
        "methods": {"mle": None, "tfb": {"base": "ensemble"}},
    }
    (place / "grid.yaml").write_text(yaml.safe_dump(settings))
    said = failed(["bench", place / "grid.yaml", f"--output={place / 'out'}"], capsys)
    assert "TFB starts from one adapter: got a Mixture" in said
