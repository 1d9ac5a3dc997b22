"""An export is what the posterior predicts: loaded by stock PEFT alone, folder by folder."""

import hashlib
import json
import shutil
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import bayestune
from bayestune import Draws, export, load_posterior, predict
from bayestune.decisions import Calibration
from bayestune.posteriors import posterior_digest
from bayestune.session import Session, TaskOptions
from bayestune.sharing import read_manifest, vllm_command
from running import failed, fitting, own_rows, run, write_rows

CLOSE = {"rtol": 0, "atol": 1e-5, "check_dtype": False}
METHODS = {
    "blob": {},
    "mle": {},
    "swag": {"swag.every": 1},
    "tfb": {"tfb.evaluations": 2, "tfb.draws": 2},
    "scalabl": {},
    "ensemble": {"base": "blob", "ensemble.size": 2},
    "temperature": {"base": "blob", "holdout": 0.25},
}


def stock_probabilities(place, exported, manifest, batch, scorer):
    """The average over the draws' folders, each loaded by stock PEFT on a fresh base."""
    found = []
    for adapter in manifest["adapters"]:
        if adapter["folder"].startswith("draw-"):
            base = AutoModelForCausalLM.from_pretrained(place / "model")
            model = PeftModel.from_pretrained(base, exported / adapter["folder"]).eval()
            with torch.no_grad():
                logits = scorer(model, batch)
            found.append((logits / manifest["temperature"]["average"]).softmax(-1))
    return torch.stack(found)


def asked(place, folder):
    """The session and a batch of the rows to ask, for a posterior's folder."""
    session = Session.of_posterior(folder, TaskOptions(evaluation_data=place / "test.jsonl"))
    batch = session.scorer.collate(session.scorer.encode(session.rows()))
    batch.pop("labels")
    return session, batch


def test_the_folders_average_to_what_predict_says(home, tmp_path):
    out = export(home / "out", tmp_path / "served", draws=8, draw_seed=3)
    session, batch = asked(home, home / "out")
    posterior = session.load(home / "out").posterior
    expected = predict(posterior, batch, draws=8, seed=3)
    manifest = read_manifest(out)
    found = stock_probabilities(home, out, manifest, batch, session.scorer)
    assert found.std(0).max() > 0.001  # the draws differ
    torch.testing.assert_close(found.mean(0), expected.probabilities, **CLOSE)
    other = predict(posterior, batch, draws=8, seed=4).probabilities
    assert (found.mean(0) - other).abs().max() > 1e-4
    mean = predict(posterior, batch, draws=0).probabilities
    base = AutoModelForCausalLM.from_pretrained(home / "model")
    model = PeftModel.from_pretrained(base, out / "mean").eval()
    with torch.no_grad():
        own = session.scorer(model, batch).softmax(-1)
    torch.testing.assert_close(own, mean, **CLOSE)


@pytest.mark.parametrize("method", METHODS)
def test_every_family_of_adapters_is_exported(method, home, tmp_path):
    given = {"holdout": 0.0, **METHODS[method]}
    run(*fitting(home, method=method, **given | {"output": tmp_path / "fit"}))
    out = export(tmp_path / "fit", tmp_path / "served", draws=4)
    manifest = read_manifest(out)
    session, batch = asked(home, tmp_path / "fit")
    expected = predict(session.load(tmp_path / "fit").posterior, batch, Draws(4))
    found = stock_probabilities(home, out, manifest, batch, session.scorer)
    torch.testing.assert_close(found.mean(0), expected.probabilities, **CLOSE)
    count = {"mle": 1, "ensemble": 4}.get(method, 4)
    assert len(found) == count
    assert (out / "mean").is_dir() == (method != "ensemble")


def test_the_folders_are_plain_and_the_manifest_says_what_they_are(home, tmp_path, capsys):
    run("export", home / "out", f"--to={tmp_path / 'served'}", "--draws=2", "--name=tickets")
    out = tmp_path / "served"
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"in {out}: mean, student, draw-0, draw-1, manifest.json"
    assert {path.name for path in out.iterdir()} == {
        "mean",
        "student",
        "draw-0",
        "draw-1",
        "manifest.json",
    }
    for folder in ("mean", "student", "draw-0", "draw-1"):
        files = {path.name for path in (out / folder).iterdir()}
        assert files == {"adapter_config.json", "adapter_model.safetensors"}
        names = load_file(out / folder / "adapter_model.safetensors")
        assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in names)
    student = load_file(home / "student/adapter_model.safetensors")
    for name, value in load_file(out / "student/adapter_model.safetensors").items():
        assert torch.equal(value, student[name])

    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["base_model"] == str(home / "model")
    assert manifest["posterior"]["method"] == "blob"
    assert manifest["posterior"]["digest"] == posterior_digest(home / "out")
    assert manifest["draws"] == {"seed": 0, "indices": [0, 1]}
    assert manifest["lora"] == {"rank": 2, "alpha": 16, "targets": ["lm_head", "q_proj", "v_proj"]}
    assert manifest["average"]["of"] == "probabilities"
    assert manifest["calibration"] is None
    assert manifest["temperature"] == {"average": 1.0, "mean": 1.0, "student": 1.0}
    assert [one["name"] for one in manifest["adapters"]][::3] == ["tickets-mean", "tickets-draw-1"]
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
    assert len(manifest["files"]) == 8
    answers = manifest["questions"]["answers"]
    assert [one["text"] for one in answers[:2]] == [" A", " B"]
    assert "{choices}" in manifest["questions"]["prompt"]
    assert said[1].endswith(vllm_command(out))
    command = vllm_command(out)
    assert command.startswith(f"vllm serve {home / 'model'} --enable-lora --max-loras 4")
    assert "--max-lora-rank 8 " in command
    assert f"tickets-draw-1={out / 'draw-1'}" in command


def test_a_posterior_in_memory_is_exported(home, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(home / "model")
    posterior = load_posterior(base, home / "out")
    out = bayestune.export(posterior, tmp_path / "a", draws=2)
    again = export(home / "out", tmp_path / "b", draws=2)
    name = "draw-1/adapter_model.safetensors"
    assert (out / name).read_bytes() == (again / name).read_bytes()
    assert read_manifest(out)["questions"] is None


def calibrated(folder, **settings):
    """A calibration as if it had been made, for a copy of a posterior."""
    given = (f"--rows={folder.parent / 'held.jsonl'}", "--risk=0.5", "--draws=[2]", "--factors=[]")
    run("calibrate", folder, *given)
    found = Calibration.read(folder, posterior_digest(folder))
    own = {**found.settings, "student": None, "band": None, "factor": 1.0, **settings}
    replace(found, temperature=1.7, settings=own).write(folder)


def test_a_calibrations_temperature_goes_where_it_was_chosen(home, tmp_path):
    shutil.copytree(home / "out", tmp_path / "fit")
    write_rows(tmp_path / "held.jsonl", own_rows(60, start=100))
    calibrated(tmp_path / "fit", draws=6, draw_seed=2)
    manifest = read_manifest(export(tmp_path / "fit", tmp_path / "a"))
    assert manifest["draws"] == {"seed": 2, "indices": list(range(6))}  # as calibrated
    assert manifest["temperature"] == {"average": 1.7, "mean": 1.0, "student": 1.0}
    assert manifest["calibration"]["temperature"] == 1.7
    other = read_manifest(export(tmp_path / "fit", tmp_path / "b", draws=5))
    assert other["temperature"]["average"] == 1.0  # it was not chosen for these
    found = Calibration.read(tmp_path / "fit", posterior_digest(tmp_path / "fit"))
    replace(found, settings={**found.settings, "draws": 0}).write(tmp_path / "fit")
    mean = read_manifest(export(tmp_path / "fit", tmp_path / "c", draws=2))
    assert mean["temperature"] == {"average": 1.0, "mean": 1.7, "student": 1.0}


def test_draws_whose_noise_a_calibration_scaled_are_exported_as_it_predicts(home, tmp_path):
    fit = shutil.copytree(home / "out", tmp_path / "fit")
    write_rows(tmp_path / "held.jsonl", own_rows(60, start=100))
    calibrated(fit, draws=6, draw_seed=2, factor=2.0)
    out = export(fit, tmp_path / "wide")
    manifest = read_manifest(out)
    assert manifest["draws"] == {"seed": 2, "indices": list(range(6)), "factor": 2.0}
    assert manifest["temperature"]["average"] == 1.7
    session, batch = asked(home, fit)
    found = stock_probabilities(home, out, manifest, batch, session.scorer).mean(0)
    for line, row in zip(bayestune.decide(fit, home / "test.jsonl"), found.tolist(), strict=True):
        told = line["probabilities"]
        assert row[: len(told)] == pytest.approx(told, abs=1e-5)
    other = read_manifest(export(fit, tmp_path / "other", draws=5))
    assert other["draws"] == {"seed": 2, "indices": list(range(5))}  # not chosen for these


# Students


def test_a_student_is_found_or_named(home, tmp_path, caplog, capsys):
    shutil.copytree(home / "out", tmp_path / "fit")
    assert not (export(tmp_path / "fit", tmp_path / "a", draws=0) / "student").exists()
    given = export(tmp_path / "fit", tmp_path / "b", draws=0, student=home / "student")
    assert (given / "student").is_dir()
    assert "does not say" not in caplog.text
    run(*fitting(home, method="mle", output=tmp_path / "mle"))
    export(tmp_path / "fit", tmp_path / "c", draws=0, student=tmp_path / "mle")
    assert "does not say that it was distilled from this very posterior" in caplog.text
    for name in ("one", "two"):
        shutil.copytree(home / "student", tmp_path / name)
    said = failed(["export", tmp_path / "fit", f"--to={tmp_path / 'd'}"], capsys)
    assert "got ['one', 'two'], expected one; give --student" in said


# Where it is written


def test_an_export_replaces_an_export_and_nothing_else(home, tmp_path, capsys):
    out = tmp_path / "served"
    export(home / "out", out, draws=3)
    (out / "notes.txt").write_text("mine")
    command = ["export", home / "out", f"--to={out}", "--draws=1"]
    assert "is not empty: choose another --to, or give --overwrite" in failed(command, capsys)
    run(*command, "--overwrite")
    assert {path.name for path in out.iterdir()} == {
        "mean",
        "student",
        "draw-0",
        "manifest.json",
        "notes.txt",
    }
    said = failed(["export", home / "out", f"--to={home / 'out'}", "--overwrite"], capsys)
    assert "without a manifest.json of ours, expected an earlier export" in said
    (tmp_path / "file").write_text("")
    assert "is a file" in failed(["export", home / "out", f"--to={tmp_path / 'file'}"], capsys)


# What cannot be exported


@pytest.mark.parametrize(
    ("method", "given", "what"),
    [
        ("mc_dropout", {"lora.dropout": 0.1}, "passes with dropout masks"),
        ("laplace", {}, "logits around the mean's"),
    ],
)
def test_draws_that_are_no_adapters_are_refused(method, given, what, home, tmp_path, capsys):
    run(*fitting(home, method=method, output=tmp_path / "fit", **given))
    said = failed(["export", tmp_path / "fit", f"--to={tmp_path / 'served'}"], capsys)
    assert f"got a posterior of {method} (" in said
    assert f"whose draws are {what}, expected a posterior such as blob's" in said
    assert "`bayestune distil`" in said
    assert not (tmp_path / "served").exists()


def test_what_vllm_does_not_load_is_refused_for_it_alone(home, tmp_path, capsys, caplog):
    config = home / "out/adapter_config.json"
    shutil.copytree(home / "out", tmp_path / "fit")
    told = json.loads(config.read_text(encoding="utf-8"))
    changed = {**told, "bias": "lora_only"}
    (tmp_path / "fit/adapter_config.json").write_text(json.dumps(changed))
    command = ["export", tmp_path / "fit", f"--to={tmp_path / 'served'}", "--draws=1"]
    said = failed([*command, "--server=vllm"], capsys)
    assert "vLLM does not load mean: got trained biases (bias='lora_only')" in said
    assert not (tmp_path / "served").exists()
    run(*command)
    assert "does not load mean: got trained biases" in caplog.text
    assert caplog.text.count("trained biases") == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"draws": -1}, "got -1, expected a whole number of 0 or more"),
        ({"name": "a b"}, "got name='a b', expected one that a server's URL"),
        ({"server": "vlm"}, "did you mean 'vllm'"),
    ],
)
def test_nonsense_is_refused(options, said, home, tmp_path):
    with pytest.raises(bayestune.Refusal, match=said):
        export(home / "out", tmp_path / "served", **options)
