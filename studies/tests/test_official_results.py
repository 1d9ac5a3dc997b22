"""Their code and ours side by side: the same prompts, order and start; what is recorded.

With OFFICIAL_CHECKOUT, a checkout of the authors' code, all holds of that code too.
"""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from bayestune.adapters import GaussianLinear, Lora, Slots, attach, bayesify
from bayestune.metrics import nll
from bayestune.whole_files import read_json_lines
from studies import official_arms, official_runs
from studies import official_results as study
from studies.tests.whole_checkout import write_whole_checkout
from tests.hub_files import arc_rows, write_lines, write_model

REAL = os.environ.get("OFFICIAL_CHECKOUT")
MANNER, THEIRS = "MLE, ours in its manner", "MLE, theirs"


NEEDS_REAL = pytest.mark.skipif(REAL is None, reason="OFFICIAL_CHECKOUT names no checkout")


@pytest.fixture(params=["made up", pytest.param("real", marks=NEEDS_REAL)])
def checkout(request, tmp_path, imports_undone):
    if request.param == "real":
        return Path(str(REAL))
    return write_whole_checkout(tmp_path / "checkout")


@pytest.fixture
def asked(checkout, llama, byte_level, tmp_path, monkeypatch):
    """The command's arguments: a tiny model that learns fast, tiny rows."""
    monkeypatch.setattr(
        official_runs, "OF_BOTH", official_runs.OF_BOTH.replace("--lr 1e-4", "--lr 1e-2")
    )
    rows = arc_rows(500)
    for number, row in enumerate(rows):
        row["question_stem"] = row.pop("question")
        row["answerKey"] = "ABCD"[number * 7 // 3 % 4]
    write_lines(tmp_path / "data" / study.DATA, train=rows, validation=rows[:20])
    model = write_model(tmp_path / "model", llama(initializer_range=0.3), byte_level)
    folders = ["--official", checkout, "--model", model, "--data_root", tmp_path / "data"]
    sizes = "--revision abc1234 --steps 50 --train_rows 20 --rows 12 --draws 3 --seeds 1 2"
    rest = ["--dtype", "float32", "--output", tmp_path / "found"]
    return [str(word) for word in ("run", *folders, *sizes.split(), *rest)]


@pytest.fixture
def bench(asked):
    return study.opened(study.parser().parse_args(asked), seed=1)


def probabilities_of(bench, arm):
    return bench.measured(arm)[0][1]


def mean_nll(records, arm):
    """Of an arm's two seeds."""
    return sum(record["figures"]["nll"] for record in records if record["arm"] == arm) / 2


def test_both_take_the_same_steps_from_the_same_start(bench, monkeypatch):
    theirs = probabilities_of(bench, THEIRS)
    ours = probabilities_of(bench, MANNER)
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)
    monkeypatch.setattr(official_arms, "InOrder", TrainerCallback)
    assert (probabilities_of(bench, MANNER) - theirs).abs().max() > 2e-3


@NEEDS_REAL
@pytest.mark.parametrize("checkout", ["real"], indirect=True)
def test_without_noise_the_whole_of_blob_is_theirs(bench, monkeypatch):
    """AdamW's steps and the KL's, through its first burst; their KL adds 1e-6, which σ shows."""
    long = replace(bench, official=replace(bench.official, steps=100))
    start = long.official.run("blob", 1).std()
    monkeypatch.setattr(torch, "randn_like", lambda like: torch.full_like(like, 1e-6))
    theirs, ours = (
        long.measured(f"BLoB, {whose}")[0] for whose in ("theirs", "ours in its manner")
    )
    torch.testing.assert_close(ours[1], theirs[1], atol=2e-4, rtol=0)
    assert ours[0]["std"] == pytest.approx(theirs[0]["std"], rel=1e-3)
    assert theirs[0]["std"] > 5 * start


def test_the_start_is_copied_with_its_standard_deviations(bench, llama):
    start = bench.official.run("blob", 3).values()
    ours = attach(llama(), Lora(targets=official_runs.TARGETS))
    bayesify(ours, noise="token")
    official_runs.put_start(ours, start)
    layers = Slots(ours).layers
    assert {path.rpartition(".")[2] for path in layers} == set(official_runs.TARGETS)
    for path, layer in layers.items():
        mean = layer.lora_A["default"]
        assert isinstance(mean, GaussianLinear)
        assert torch.equal(mean.weight, start[path]["A"])
        assert torch.equal(mean.std, start[path]["rho"].square())
    other = attach(llama(), Lora(targets=("q_proj",)))
    with pytest.raises(ValueError, match=r"different layers: got \['lm_head'"):
        official_runs.put_start(other, start)


def test_the_prompts_are_theirs_in_the_grids_rows(bench):
    rows = (*bench.task.train, *bench.task.evaluation)
    tokenizer = bench.scorer.tokenizer
    data = bench.official.data(bench.official.arguments("mle", 1))
    by_id = {row["id"]: row for row in (*bench.official.train, *bench.official.evaluation)}
    for row, encoded in zip(rows, bench.scorer.encode(rows), strict=True):
        raw = by_id[row.id]
        assert raw["question_stem"] == row.question
        assert "ABCD".index(raw["answerKey"]) == encoded["answer"]
        inputs = data.dset.clm_collate_fn([raw])[0]
        assert encoded["ids"] == inputs["input_ids"][0].tolist()
    batch = next(iter(data.train_dataloader))
    assert batch[1].tolist() == [row.answer for row in bench.task.train[:4]]
    assert bench.scorer.tokens == data.target_ids[:, 0].tolist()
    assert tokenizer.convert_ids_to_tokens(bench.scorer.tokens) == list("ABCD")


def test_noise_is_theirs_alone_and_the_mean_has_none(bench):
    run = bench.official.run("blob", 1)
    mean = run.evaluate(0).logits
    assert mean.shape == (1, 12, 4)
    assert torch.equal(mean, run.evaluate(0).logits)
    drawn = run.evaluate(3).logits
    assert drawn.shape == (3, 12, 4)
    assert run.std() == pytest.approx(0.0018, abs=0.0009)  # of ρ in (0.03, 0.05)


def test_records_agree_and_go_on(asked, capsys):
    asked += ["--steps", "17"]
    study.main([*asked, "--arms", "BLoB, theirs", MANNER, "--seeds", "1"])
    folder = Path(asked[asked.index("--output") + 1])
    first = read_json_lines(folder / "records.jsonl")
    assert [record["draws"] for record in first] == [0, 3, 0]
    study.main(asked)
    records = read_json_lines(folder / "records.jsonl")
    assert records[:3] == first
    keys = {(record["arm"], record["seed"], record["draws"]) for record in records}
    assert len(keys) == len(records) == 2 * (3 * 2 + 3)
    for record in records:
        rows = read_json_lines(folder / record["rows"])
        kept = torch.tensor([row["probabilities"] for row in rows], dtype=torch.float64)
        answers = torch.tensor([row["answer"] for row in rows])
        assert nll(kept, answers) == pytest.approx(record["figures"]["nll"], rel=1e-6)
        assert (record["std"] is None) == record["arm"].startswith("MLE")
        if record["arm"].endswith("theirs"):
            told = record["told"]
            assert told["nll"] == pytest.approx(record["figures"]["nll"], rel=1e-4)
            assert told["accuracy"] == pytest.approx(record["figures"]["accuracy"], rel=1e-4)
    capsys.readouterr()
    study.main(["table", "--output", str(folder)])
    said = capsys.readouterr().out
    theirs, ours = (mean_nll(records, arm) for arm in (THEIRS, MANNER))
    assert f"| MLE, theirs | 0 | 1, 2 | {theirs:.3f} |" in said
    assert f"| MLE, ours in its manner | 0 | 1, 2 | {theirs - ours:+.3f} [" in said
    assert (folder / "table.md").read_text(encoding="utf-8") == said


def test_a_checkout_without_a_commit_is_refused(asked):
    at = asked.index("--revision")
    with pytest.raises(ValueError, match=r"--revision: got none, and .* is no git checkout"):
        study.main(asked[:at] + asked[at + 2 :])


def test_half_a_batch_is_refused(asked, capsys):
    with pytest.raises(SystemExit):
        study.main([*asked, "--rows", "13"])
    assert "whole batches" in capsys.readouterr().err
