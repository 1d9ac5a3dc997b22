"""`bayestune distil`: a student of a posterior's folder, for every kind of it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from bayestune.cli import main
from bayestune.forward import Draws
from bayestune.methods import Distilled
from bayestune.methods.asking import Asking
from bayestune.posteriors import load_posterior, posterior_digest, read_details
from bayestune.scoring import make_scorer
from bayestune.session import Session, TaskOptions
from running import (
    failed,
    fitting,
    furnish,
    own_rows,
    predicted,
    probabilities,
    run,
    write_rows,
)
from tiny import tiny_llama

CLASSES = ("red", "green", "blue")


@pytest.fixture
def place(tmp_path, llama, byte_level):
    """A folder with rows and a model whose answers are not all alike."""
    return furnish(tmp_path, llama(initializer_range=0.3), byte_level)


def distilling(place, *options, output="student", posterior="out", rows="ask.jsonl", steps=4):
    given = [f"--unlabelled={place / rows}"] if rows else []
    quick = [f"--steps={steps}", "--batch_size=2"]
    return ["distil", place / posterior, *given, f"--output={place / output}", *quick, *options]


def facts(place, folder="student"):
    return read_details(place / folder)["facts"]["teacher"]


def class_rows(count, start=0):
    rows = []
    for i in range(start, start + count):
        question = f"what is {CLASSES[i % 3]} ({i})?"
        rows.append({"question": question, "options": CLASSES, "answer": i % 3})
    return rows


def furnish_head(folder, model, tokenizer):
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_rows(folder / "train.jsonl", class_rows(8))
    write_rows(folder / "test.jsonl", class_rows(5, start=20))
    unlike = [{**row, "options": CLASSES[::-1]} for row in class_rows(7, start=40)]
    write_rows(folder / "ask.jsonl", [{**row, "answer": None} for row in unlike])
    return folder


def test_a_student_is_a_stock_adapter_that_every_command_takes(place, capsys):
    run(*fitting(place, scoring="text", **{"lora.dropout": 0.1}))
    run(*distilling(place))
    student = place / "student"
    assert (
        capsys.readouterr()
        .out.splitlines()[-1]
        .endswith(f"fresh draws of the posterior {posterior_digest(place / 'out')[:12]} on 7 rows")
    )
    names = load_file(student / "adapter_model.safetensors")
    assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in names)
    files = {file.name for file in student.iterdir()}
    assert {"posterior.json", "posterior.safetensors", "training.json", "run.json"} <= files

    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    session = Session.of_posterior(student, TaskOptions(evaluation_data=place / "test.jsonl"))
    batch = session.scorer.collate(session.scorer.encode(session.rows()))
    batch.pop("labels")
    ours = session.load(student).posterior.logits(batch, Draws(0))[0]
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    stock = PeftModel.from_pretrained(base, student).eval()
    with torch.no_grad():
        scorer = make_scorer(stock, tokenizer, session.task, "text")
        torch.testing.assert_close(scorer(stock, batch), ours, rtol=1e-5, atol=1e-5)

    run("evaluate", f"--posterior={student}", f"--evaluation_data={place / 'test.jsonl'}")
    assert "Distilled" in capsys.readouterr().out
    write_rows(place / "held.jsonl", own_rows(60, start=100))
    run("calibrate", student, f"--rows={place / 'held.jsonl'}", "--risk=0.5")
    assert all("decision" in row for row in predicted(place, posterior="student"))


def test_a_heads_student_has_its_classes(tmp_path, bert, byte_level):
    place = furnish_head(tmp_path, bert(initializer_range=0.3), byte_level)
    targets = {"lora.targets": "[query,value]", "blob.final_std": 0.1}
    run(*fitting(place, scoring="head", learning_rate=0.05, steps=8, **targets))
    run(*distilling(place, "--draws=3"))
    assert facts(place)["draws"] == 3
    details = read_details(place / "student")
    assert details["class_names"] == list(CLASSES)
    base = AutoModelForSequenceClassification.from_pretrained(place / "model", num_labels=3)
    stock = PeftModel.from_pretrained(base, place / "student").eval()
    options = TaskOptions(evaluation_data=place / "test.jsonl")
    session = Session.of_posterior(place / "student", options)
    batch = session.scorer.collate(session.scorer.encode(session.rows()))
    batch.pop("labels")
    ours = session.load(place / "student").posterior.logits(batch, Draws(0))[0]
    with torch.no_grad():
        torch.testing.assert_close(session.scorer(stock, batch), ours, rtol=1e-5, atol=1e-5)
    found = predicted(place, posterior="student")
    assert all(row["options"] == list(CLASSES) for row in found)


@pytest.mark.parametrize(
    ("method", "more", "draws"),
    [
        ("mle", {}, 1),
        ("ensemble", {"ensemble.size": 2}, 2),
        ("laplace", {}, 1000),
        ("mc_dropout", {}, "fresh"),
        ("swag", {"swag.every": 1}, "fresh"),
        ("tfb", {"tfb.evaluations": 2, "tfb.draws": 2}, "fresh"),
        ("temperature", {"base": "ensemble", "ensemble.size": 2, "holdout": 0.25}, 2),
        ("scalabl", {}, "fresh"),
        ("distilled", {"distilled.steps": 3}, 1),
    ],
)
def test_every_kind_of_posterior_teaches(place, method, more, draws):
    run(*fitting(place, method=method, **more))
    run(*distilling(place))
    told = facts(place)
    assert (told["draws"], told["rows"]) == (draws, 7)
    assert told["digest"] == posterior_digest(place / "out")
    details = read_details(place / "student")
    assert details["fields"]["base"]["method"] == method
    assert sum(probabilities(predicted(place, posterior="student"))) == pytest.approx(7)


# Rows


def test_without_a_file_the_training_rows_are_asked_about(place, capsys):
    run(*fitting(place, method="mle", train_rows=5, unlabelled_rows=3))
    said = failed(distilling(place, rows=None), capsys)
    assert "was trained on the rows of train.jsonl; expected these rows or others" in said
    run(*distilling(place, f"--data={place / 'train.jsonl'}", "--unlabelled_rows=0", rows=None))
    assert facts(place)["rows"] == 5
    given = (f"--data={place / 'train.jsonl'}", "--overwrite")
    run(*distilling(place, *given, rows=None))
    assert facts(place)["rows"] == 3  # those that the fit had set aside
    run(*distilling(place, *given, "--labelled", steps=6))
    assert facts(place)["rows"] == 7 + 5
    run(*distilling(place, *given, "--unlabelled_rows=2", steps=6))
    assert facts(place)["rows"] == 7 + 2
    write_rows(place / "other.jsonl", own_rows(8, start=50))
    other = (f"--data={place / 'other.jsonl'}", "--overwrite")
    said = failed(distilling(place, *other, rows=None), capsys)
    assert "got 5 training rows, which are not those of the posterior; expected its 5" in said


def test_the_training_rows_of_a_task_are_found_again(place):
    few = {"task": "everyday", "train_rows": 4, "method": "mle"}
    arguments = [text for text in fitting(place, **few) if not text.startswith("--data")]
    run(*arguments)
    run(*distilling(place, rows=None))
    assert facts(place)["rows"] == 4
    run(*distilling(place, "--unlabelled_rows=6", "--overwrite", rows=None))
    assert facts(place)["rows"] == 6


def test_rows_without_options_have_those_of_the_fit(place, capsys):
    shared = [{**row, "options": None} for row in own_rows(6)]
    write_rows(place / "bare.jsonl", [{"question": row["question"]} for row in shared])
    run(*fitting(place, method="mle"))
    said = failed(distilling(place, rows="bare.jsonl"), capsys)
    assert "no options; give a column 'options'" in said
    run(*distilling(place, "--options=[yes,no]", rows="bare.jsonl"))
    labelled = [{"question": row["question"], "answer": i % 2} for i, row in enumerate(shared)]
    write_rows(place / "train.jsonl", labelled)
    run(*fitting(place, method="mle", options="[yes,no]", output="shared"))
    run(*distilling(place, posterior="shared", rows="bare.jsonl", output="student2"))
    assert facts(place, "student2")["rows"] == 6


@pytest.mark.parametrize("answer", ["purple", [1, 2]])
def test_answers_of_unlabelled_rows_are_not_looked_at(place, answer):
    """Not even where they could not be any option."""
    run(*fitting(place, method="mle"))
    write_rows(place / "odd.jsonl", [{**row, "answer": answer} for row in own_rows(5)])
    run(*distilling(place, rows="odd.jsonl", steps=3))
    assert facts(place)["rows"] == 5
    unlabelled = {"unlabelled_data": place / "odd.jsonl", "distilled.steps": 3}
    run(*fitting(place, method="distilled", base="mle", output="fitted", **unlabelled))
    assert facts(place, "fitted")["rows"] == 5


def test_a_student_has_seen_its_rows_and_its_teachers(place, capsys):
    """So that figures and promises on either are told or refused."""
    run(*fitting(place, method="mle"))
    write_rows(place / "spare.jsonl", own_rows(60, start=200))
    run(*distilling(place, rows="spare.jsonl"))
    command = ["calibrate", place / "student", f"--rows={place / 'spare.jsonl'}"]
    assert "got 8 of 60 rows that training saw" in failed(command, capsys)
    command = ["calibrate", place / "out", f"--rows={place / 'spare.jsonl'}"]
    said = failed([*command, f"--student={place / 'student'}"], capsys)
    assert "got 8 of 60 rows that training saw" in said
    seen = read_details(place / "student")["seen"]
    assert len(seen) == 12 * (8 + 8)
    teachers = read_details(place / "out")["seen"]
    assert all(teachers[i : i + 12] in seen for i in range(0, len(teachers), 12))


# What cannot work


@pytest.mark.parametrize("number", ["--steps=0", "--learning_rate=0", "--draws=0", "--seed=-1"])
def test_nonsense_is_refused(place, number, capsys):
    run(*fitting(place, method="mle"))
    said = failed([*distilling(place), number], capsys)
    assert "got " in said
    assert "expected a" in said
    assert not (place / "student").exists()


def test_what_cannot_work_is_refused_before_any_work(place, capsys, byte_level):
    run(*fitting(place, method="mle"))
    write_rows(place / "empty.jsonl", [])
    assert "empty.jsonl" in failed(distilling(place, rows="empty.jsonl"), capsys)
    write_rows(place / "passages.jsonl", own_rows(3, context="the sky is blue"))
    said = failed(distilling(place, rows="passages.jsonl"), capsys)
    assert "unlabelled rows have a context" in said
    tiny_llama(initializer_range=0.1, vocab_size=401).save_pretrained(place / "another")
    byte_level.save_pretrained(place / "another")
    said = failed(distilling(place, f"--model={place / 'another'}"), capsys)
    assert "is of another base model" in said
    assert not (place / "student").exists()
    said = failed(distilling(place, posterior="model"), capsys)
    assert "is not a posterior" in said
    said = failed(distilling(place, "--overwrite", output="out"), capsys)
    assert "holds an input, --posterior" in said


# Resuming


def bits(folder):
    state = load_file(folder / "adapter_model.safetensors")
    return {name: value.numpy().tobytes() for name, value in state.items()}


@pytest.mark.parametrize("cut", ["asking", "training"])
def test_a_student_that_is_cut_off_ends_as_the_whole_one(place, cut, monkeypatch, capsys):
    run(*fitting(place, method="blob"))
    options = ("--save_steps=2", "--progress=false")
    run(*distilling(place, *options, steps=8, output="whole"))
    learn, asked = Distilled.learn, Asking._asked
    calls = []

    def asks_once(self, batches):
        if calls:
            raise KeyboardInterrupt
        calls.append(batches)
        return asked(self, batches)

    def half(self, model, scorer, taught, training):
        changed = replace(training, save_steps=2)
        student = learn(self, model, scorer, taught, changed)
        for path in (training.output / "checkpoint-8", training.output / "checkpoint-6"):
            shutil.rmtree(path)
        assert student.atoms == 1
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        if cut == "asking":
            broken.setattr(Asking, "_asked", asks_once)
        else:
            broken.setattr(Distilled, "learn", half)
        command = [*map(str, distilling(place, *options, steps=8, output="cut"))]
        assert main(command) == 130
    assert not (place / "cut" / "posterior.json").exists()
    capsys.readouterr()
    said = failed([*command, "--resume", "--learning_rate=0.01"], capsys)
    assert "learning_rate: got 0.01, the run has 0.0003" in said
    run(*command, "--resume")
    assert bits(place / "cut") == bits(place / "whole")
    assert facts(place, "cut") == facts(place, "whole")
    assert (place / "cut/checkpoints/taught/taught.json").is_file()
    run(*command, "--resume")
    assert "finished already" in capsys.readouterr().out


def test_a_students_folder_is_its_teachers_but_for_what_it_learnt(place):
    """All that predictions need stands in it, and it loads without the teacher."""
    run(*fitting(place, method="blob", bf16="true", max_length=200))
    run(*distilling(place))
    (place / "out").rename(place / "moved")
    own, teachers = read_details(place / "student"), read_details(place / "moved")
    for name in ("task", "scoring", "classes", "dtype", "max_length", "train_rows", "base_model"):
        assert own[name] == teachers[name]
    assert own["training"]["bf16"] is True
    assert own["training"]["lora"] == teachers["training"]["lora"]
    student = load_posterior(tiny_llama(initializer_range=0.3), place / "student")
    assert student.teacher.digest == posterior_digest(place / "moved")
    assert json.loads(Path(place, "student/training.json").read_text())["steps"] == 3 + 4
