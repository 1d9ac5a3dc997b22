"""The sections of fidelity.py print what they say, at tiny sizes."""

import math

import pytest
import torch

from bayestune.kl import kl_divergence
from studies import fidelity
from tests.hub_files import write_lines


def test_the_kl_with_epsilon_is_the_kl_but_for_it():
    mean = torch.randn(4, 6) * 0.1
    std = torch.rand(4, 6) * 0.1 + 0.05
    exact = kl_divergence(mean.double(), std.double(), 0.2)
    assert 0 < abs(fidelity.kl_with_epsilon(mean, std) / exact - 1) < 1e-4


def test_the_published_settings_end_where_they_are_said_to():
    ends = [fidelity.std_of_run(rows, 0.0) for rows in fidelity.ROWS.values()]
    assert ends == pytest.approx([0.187, 0.174, 0.152, 0.148, 0.122, 0.098], abs=6e-4)
    rounded = [fidelity.std_of_run(rows, 1e-6) for rows in fidelity.ROWS.values()]
    assert rounded == pytest.approx(ends, rel=1e-4)
    assert all(one < other for one, other in zip(rounded, ends, strict=True))


def test_logits_are_averaged_before_or_after_the_softmax():
    both = fidelity.averaged(torch.tensor([[[4.0, 0.0]], [[0.0, 0.0]]]))
    sure = 1 / (1 + math.exp(-4.0))
    assert both["probabilities"][0, 0] == pytest.approx((sure + 0.5) / 2)
    assert both["logits"][0, 0] == pytest.approx(1 / (1 + math.exp(-2.0)))


@pytest.mark.parametrize("section", fidelity.NEED_NO_MODEL)
def test_a_section_prints_its_figures(section, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(fidelity, "PASSES", 200)
    monkeypatch.setattr(fidelity, "CHOICES", 20)
    fidelity.main([section, "--cache", str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.startswith(f"{section}: ")
    assert "nan" not in printed


def test_an_unknown_section_is_refused(capsys):
    with pytest.raises(SystemExit):
        fidelity.main(["everything"])
    said = capsys.readouterr().err
    assert "unknown sections: got ['everything'], expected some of ['noise-correlation'" in said


def test_the_fits_are_kept_and_compared(real, tmp_path, capsys):
    options = ["token-noise", *real, "--cache", str(tmp_path / "cache"), "--steps", "8"]
    options += ["--rows", "6", "--draws", "2", "--fits", "row-constant", "token-bursts"]
    fidelity.main(options)
    first = capsys.readouterr().out
    assert "8 steps in" in first
    assert "nll, token-bursts/token − row-constant/row: " in first
    files = sorted(file.stem for file in (tmp_path / "cache").iterdir())
    assert files == ["row-constant", "token-bursts"]
    fidelity.main(options)
    again = capsys.readouterr().out
    assert first.endswith(again)
    assert "steps in" not in again


def test_prompts_are_compared_on_the_same_questions(real, capsys):
    fidelity.main(["prompts", *real, "--rows", "4"])
    printed = capsys.readouterr().out
    assert "prompts: arc_easy, n 4" in printed
    assert "prompts: arc_easy_authors, n 4" in printed
    assert "  nll of theirs − of the paper's " in printed


def test_prompts_that_lose_their_end_are_counted(real, tmp_path, capsys):
    rows = []
    for question, passage in (("is the sky blue", "x " * 600), ("is the sky red", "x")):
        rows.append({"question": question, "answer": True, "passage": passage})
    write_lines(tmp_path / "data/google/boolq/default", train=rows, validation=rows)
    fidelity.main(["truncation", *real])
    assert "evaluation: 1 of 2 prompts are longer than 300 tokens" in capsys.readouterr().out
