"""Uploads and downloads of posteriors, at the boundary: a Hub that is a folder."""

import fnmatch
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM

from bayestune import Draws, Refusal, calibrate, decide, load_posterior, push_to_hub
from bayestune.posteriors import posterior_digest, read_details
from bayestune.sharing.card import card_digest
from running import failed, fitting, own_rows, predicted, probabilities, read_rows, run, write_rows
from tiny import BATCH, end_logits


class FolderHub:
    """The Hub's calls that are used, over folders: a folder for each repository and revision."""

    def __init__(self, root):
        self.root = root
        self.private = {}
        self.asked = []

    def place(self, repo_id, revision):
        return self.root / repo_id / (revision or "main")

    def create_repo(self, _, repo_id, *, private=None, exist_ok=False, **more):
        assert exist_ok
        self.private.setdefault(repo_id, bool(private))

    def repo_info(self, _, repo_id, **more):
        return SimpleNamespace(private=self.private[repo_id])

    def create_branch(self, _, repo_id, *, branch, exist_ok, **more):
        assert exist_ok

    def upload_folder(self, _, *, repo_id, folder_path, revision, delete_patterns, **more):
        place = self.place(repo_id, revision)
        for path in sorted(place.rglob("*")):
            name = path.relative_to(place).as_posix()
            if path.is_file() and any(fnmatch.fnmatch(name, one) for one in delete_patterns):
                path.unlink()
        shutil.copytree(folder_path, place, dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def snapshot_download(self, repo_id, *, revision=None, allow_patterns=None, **more):
        self.asked.append((repo_id, revision))
        place = self.place(repo_id, revision)
        if not place.is_dir():
            raise FileNotFoundError(repo_id)
        cache = self.root / "cache" / repo_id / (revision or "main")
        for path in place.rglob("*"):
            name = path.relative_to(place).as_posix()
            if path.is_file() and any(fnmatch.fnmatch(name, one) for one in allow_patterns):
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, cache / name)
        return str(cache)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = FolderHub(tmp_path / "hub")
    for name in ("create_repo", "repo_info", "create_branch", "upload_folder"):
        call = getattr(hub, name)
        monkeypatch.setattr(HfApi, name, lambda api, *a, _call=call, **k: _call(api, *a, **k))
    download = hub.snapshot_download
    monkeypatch.setattr("bayestune.posteriors.folder_of.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    return hub


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def draws(base, folder):
    posterior = load_posterior(base, folder, end_logits)
    return posterior.logits(BATCH, Draws(3))


def fresh(home):
    return AutoModelForCausalLM.from_pretrained(home / "model")


def test_a_posterior_goes_to_the_hub_and_comes_back(home, hub, capsys):
    run("push", home / "out", "user/tickets", "--base_model=owner/base")
    assert capsys.readouterr().out == "uploaded: https://hub/user/tickets/commit/1\n"
    pushed = hub.place("user/tickets", None)
    assert names(pushed) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "posterior.json",
        "posterior.safetensors",
        "training.json",
    }
    for path in pushed.rglob("*.*"):
        assert str(home).encode() not in path.read_bytes(), path
    told = json.loads((pushed / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == "owner/base"
    assert read_details(pushed)["base_model"] == "owner/base"
    card = (pushed / "README.md").read_text(encoding="utf-8")
    assert "# user/tickets" in card
    assert 'load_posterior(base, "user/tickets")' in card
    found = draws(fresh(home), "user/tickets")
    torch.testing.assert_close(found, draws(fresh(home), home / "out"), rtol=0, atol=0)


def test_a_revision_is_uploaded_and_loaded(home, hub):
    push_to_hub(home / "student", "user/tickets", base_model="owner/base")
    push_to_hub(home / "out", "user/tickets", revision="v1", base_model="owner/base")
    found = draws(fresh(home), "user/tickets@v1")
    torch.testing.assert_close(found, draws(fresh(home), home / "out"), rtol=0, atol=0)
    assert hub.asked[-1] == ("user/tickets", "v1")
    assert load_posterior(fresh(home), "user/tickets").atoms == 1  # the student
    with pytest.raises(Refusal, match="user/none is not a posterior: got no such folder"):
        load_posterior(fresh(home), "user/none")


def test_commands_take_a_hub_id(home, hub, tmp_path, capsys):
    push_to_hub(home / "out", "user/tickets", revision="v1", base_model="owner/base")
    own = [f"--model={home / 'model'}", f"--input={home / 'ask.jsonl'}"]
    answers = tmp_path / "answers.jsonl"
    run("predict", "--posterior=user/tickets@v1", *own, "--draws=3", f"--output={answers}")
    expected = predicted(home, "--draws=3")
    assert probabilities(read_rows(answers)) == pytest.approx(probabilities(expected), abs=1e-6)
    run("export", "user/tickets@v1", f"--to={tmp_path / 'served'}", "--draws=1", own[0])
    assert (tmp_path / "served/draw-0").is_dir()
    evaluate = ["evaluate", "--posterior=user/tickets@v1", own[0]]
    evaluate.append(f"--evaluation_data={home / 'test.jsonl'}")
    said = failed(evaluate, capsys)
    assert "got user/tickets@v1 on the Hub, expected a folder of this machine" in said
    assert said.endswith("into which 'evaluate' writes; give --output")
    run(*evaluate, f"--output={tmp_path / 'records'}")
    for command in (["card", "user/tickets"], ["push", "user/tickets", "user/b"]):
        assert "download it: hf download user/tickets" in failed(command, capsys)
    (tmp_path / "runs").mkdir()
    said = failed(["predict", "--posterior=runs/gone", own[1]], capsys)
    assert "Hub" not in said  # a folder that is mistyped is not looked for there
    with pytest.raises(Refusal, match="on the Hub, expected a folder of this machine"):
        calibrate("user/tickets", home / "test.jsonl")


def test_a_calibration_goes_along(home, hub, tmp_path):
    folder = shutil.copytree(home / "out", tmp_path / "fit")
    write_rows(tmp_path / "held.jsonl", own_rows(60, start=100))
    run("calibrate", folder, f"--rows={tmp_path / 'held.jsonl'}", "--risk=0.5", "--draws=[2]")
    push_to_hub(folder, "user/tickets", base_model="owner/base")
    lines = decide("user/tickets", home / "ask.jsonl", model=str(home / "model"))
    own = decide(folder, home / "ask.jsonl")
    assert [line["decision"] for line in lines] == [line["decision"] for line in own]
    assert probabilities(lines) == pytest.approx(probabilities(own), abs=1e-6)
    push_to_hub(home / "out", "user/tickets", base_model="owner/base")
    assert "calibration.json" not in names(hub.place("user/tickets", None))


def test_members_go_along(home, hub, tmp_path):
    sizes = {"ensemble.size": 2, "base": "blob"}
    run(*fitting(home, method="ensemble", output=tmp_path / "fit", save_steps=2, **sizes))
    push_to_hub(tmp_path / "fit", "user/mixture", base_model="owner/base")
    pushed = names(hub.place("user/mixture", None))
    assert {"posterior.json", "member-1/posterior.safetensors"} <= pushed
    assert not any(name.startswith("checkpoints") or name == "run.json" for name in pushed)
    found = draws(fresh(home), "user/mixture")
    torch.testing.assert_close(found, draws(fresh(home), tmp_path / "fit"), rtol=0, atol=0)


def test_the_folders_own_card_is_taken(home, hub, tmp_path):
    folder = shutil.copytree(home / "out", tmp_path / "fit")
    (folder / "README.md").write_text("mine")
    push_to_hub(folder, "user/tickets", base_model="owner/base")
    assert (hub.place("user/tickets", None) / "README.md").read_text() == "mine"
    run("card", folder, "--overwrite", "--base_model=owner/base")
    text = (folder / "README.md").read_text()
    assert card_digest(text) == posterior_digest(folder)
    (folder / "README.md").write_text(text.replace(posterior_digest(folder), "0" * 64))
    with pytest.raises(Refusal, match="of another posterior .* run `bayestune card --overwrite`"):
        push_to_hub(folder, "user/tickets", base_model="owner/base")


# What is not uploaded


def test_what_is_not_whole_is_refused(home, hub, tmp_path):
    with pytest.raises(Refusal, match="which is not a folder; expected one of `fit`"):
        push_to_hub(tmp_path / "none", "user/a")
    folder = shutil.copytree(home / "out", tmp_path / "fit")
    (folder / ".unfinished").mkdir()
    with pytest.raises(Refusal, match="holds a run that has not ended"):
        push_to_hub(folder, "user/a")
    (folder / ".unfinished").rmdir()
    tensors = folder / "posterior.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-9])
    with pytest.raises(Refusal, match=r"posterior.safetensors is missing or cut off: got"):
        push_to_hub(folder, "user/a", base_model="owner/base")
    (folder / "posterior.json").unlink()
    with pytest.raises(Refusal, match="a run that has not ended: got no whole posterior"):
        push_to_hub(folder, "user/a")
    assert not hub.root.exists()


def test_what_others_cannot_use_is_refused(home, hub, tmp_path):
    with pytest.raises(Refusal, match="which others do not have; expected a model of the Hub"):
        push_to_hub(home / "out", "user/a")
    for name in ("tickets", "a/b/c", "user/a b"):
        with pytest.raises(Refusal, match="expected owner/name"):
            push_to_hub(home / "out", name, base_model="owner/base")
    folder = shutil.copytree(home / "out", tmp_path / "fit")
    write_rows(tmp_path / "held.jsonl", own_rows(60, start=100))
    given = (f"--rows={tmp_path / 'held.jsonl'}", "--risk=0.5", "--draws=[2]")
    run("calibrate", folder, *given)
    told = json.loads((folder / "calibration.json").read_text())
    told["settings"]["student"] = "../student"
    (folder / "calibration.json").write_text(json.dumps(told))
    with pytest.raises(Refusal, match=r"predicts with the student in \.\./student, which is not"):
        push_to_hub(folder, "user/a", base_model="owner/base")
    assert not hub.root.exists()


def test_a_private_posterior_does_not_go_to_a_public_repository(home, hub):
    given = {"base_model": "owner/base"}
    push_to_hub(home / "out", "user/open", **given)
    with pytest.raises(Refusal, match="which is there and public; expected a new or a private"):
        push_to_hub(home / "student", "user/open", private=True, **given)
    assert read_details(hub.place("user/open", None))["method"] == "blob"
    push_to_hub(home / "out", "user/closed", private=True, **given)
    assert hub.private["user/closed"]


def test_a_hub_that_says_no_is_told_in_a_line(home, hub, monkeypatch, capsys):
    def refuse(*_, **__):
        raise httpx.ConnectError("no route to host")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    said = failed(["push", home / "out", "user/a", "--base_model=owner/base"], capsys)
    assert "user/a cannot be uploaded: got ConnectError (no route to host)" in said
    assert Path(home / "out").is_dir()
