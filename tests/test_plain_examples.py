"""The examples that need no other package run, on tiny models; their table lists every file."""

import re
from pathlib import Path

import pytest

from test_likelihood_examples import EXAMPLES, bert, run  # noqa: F401
from tiny import CAUSAL, causal


@pytest.fixture
def llama_folder(tmp_path, byte_level):
    causal(CAUSAL["llama"]).save_pretrained(tmp_path / "llama")
    byte_level.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_a_bare_loop(llama_folder, capsys):
    run("bare_loop", "--model", llama_folder, "--steps", 4, "--draws", 3)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert re.fullmatch(
        r"a superb concert +good [01]\.\d\d, 0\.\d{4} nats of disagreement", lines[0]
    )


def test_a_csv_file_to_decisions(llama_folder, capsys):
    run("own_csv", "--model", llama_folder, "--steps", 4, "--held_out", 24)
    lines = capsys.readouterr().out.splitlines()[-3:]
    for line in lines:
        assert re.search(r"(billing|delivery) [01]\.\d\d +(act|abstain)$", line)


def test_an_adapter_that_exists_already(llama_folder, capsys):
    run("existing_adapter", "--model", llama_folder, "--steps", 4, "--draws", 3)
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert lines[0].startswith("How large is a wolf?")
    for line in lines:
        assert re.search(r"adapter [01]\.\d\d \((act|abstain)\), posterior [01]\.\d\d$", line)


def test_a_module_of_ones_own_is_less_sure_far_away(capsys):
    run("custom_module", "--steps", 150, "--draws", 20)
    lines = capsys.readouterr().out.splitlines()
    stds = [float(line.rpartition("±")[2]) for line in lines]
    assert len(stds) == 13
    assert min(stds[0], stds[-1]) > stds[6]


def test_an_encoder_with_a_head(bert, capsys):  # noqa: F811
    run("encoder_classifier", "--model", bert, "--steps", 2, "--draws", 3)
    out = capsys.readouterr().out
    assert len(re.findall(r"(food|sport|music) +[01]\.\d\d  epistemic -?\d\.\d{3} nats", out)) == 4


def test_the_table_lists_every_example():
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[(\w+\.py)\]\(\1\)", text, re.MULTILINE)
    assert len(set(listed)) == len(listed)
    there = {path.name for path in EXAMPLES.glob("*.py")}
    assert there == set(listed)


def test_every_example_has_a_test_that_names_it():
    tests = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.rglob("test_*.py")]
    for path in EXAMPLES.glob("*.py"):
        assert any(re.search(rf'["/]{path.stem}(\.py)?"', text) for text in tests), path.name
