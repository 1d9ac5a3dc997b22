"""Calibration against cost: arithmetic on made-up logits, parts on a tiny model, and all steps."""

import math
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bayestune.adapters import GaussianLinear, Lora, Slots, attach, bayesify
from bayestune.cli import main as bayestune
from bayestune.forward import Draws
from bayestune.posteriors import Gaussian
from bayestune.scoring import LetterScorer, row_logits
from studies import calibration_cost, calibration_page
from studies.calibration_table import (
    BLOCKS,
    EXACT,
    PREFIX,
    Setting,
    chosen,
    kept,
    row_nll,
    score,
    settings_of,
    share_kept,
)
from tests.hub_files import write_arc, write_model

ROOT = Path(__file__).parents[2]
COUNTS = (1, 2, 3, 5, 10)


# The share of the gain


def test_share_of_known_rows():
    mean = torch.tensor([2.0, 4.0]).double()
    exact = torch.tensor([1.0, 1.0]).double()
    other = torch.tensor([1.5, 3.5]).double()
    assert share_kept(mean, exact, other, 50)[0] == pytest.approx(0.5 / 2)  # not mean(1/2, 1/6)
    assert share_kept(mean, exact, mean, 50) == (0, 0, 0)
    assert share_kept(mean, exact, exact, 50) == (1, 1, 1)
    assert share_kept(mean, exact, mean + 0.5, 50)[0] == pytest.approx(-0.25)  # a loss
    assert share_kept(mean, exact, (mean + exact) / 2, 50) == pytest.approx((0.5, 0.5, 0.5))


@pytest.mark.parametrize("count", [100, 10_000])
def test_the_interval_is_that_of_a_ratio_of_means(count):
    torch.manual_seed(0)
    exact = torch.rand(count, dtype=torch.float64)
    full = torch.rand(count, dtype=torch.float64)
    gain = 0.6 * full + 0.1 * torch.randn(count, dtype=torch.float64)
    share, low, high = share_kept(exact + full, exact, exact + full - gain, 2000)
    error = (gain - share * full).std() / full.mean() / math.sqrt(count)
    assert low < share < high
    assert share == pytest.approx(0.6, abs=0.06)
    assert high - low == pytest.approx(2 * 1.96 * error.item(), rel=0.1)


def test_row_nll_averages_probabilities():
    sure = torch.tensor([0.9, 0.1]).log()
    unsure = torch.tensor([0.3, 0.7]).log()
    logits = torch.stack([torch.stack([sure, unsure]), torch.stack([unsure, unsure])])
    expected = [-math.log((0.9 + 0.3) / 2), -math.log(0.7)]
    assert row_nll(logits, torch.tensor([0, 1])).tolist() == pytest.approx(expected)


# Tables of made-up logits


def settings(**changes):
    options = {
        "draws": 10,
        "prefixes": [1, 4],
        "blocks": [2, 1],
        "factors": [2.0, 3.0],
        "factors_for": [4],
    }
    return {one.name: one for one in settings_of(Namespace(**{**options, **changes}))}


def keep(setting, folder, part, logits, labels):
    save_file({"logits": logits, "labels": labels}, setting.file(folder, part))


def test_the_factor_of_least_held_out_nll_is_chosen_if_it_beats_none(tmp_path):
    found = settings()
    right = {"prefix 4": 0.5, "prefix 4 ×2": 0.7, "prefix 4 ×3": 0.6}
    right |= {"blocks 1": 0.8, "blocks 1 ×2": 0.75, "blocks 1 ×3": 0.4}
    labels = torch.tensor([0, 0, 0])
    for name, setting in found.items():
        p = right.get(name, 0.5)
        logits = torch.tensor([p, 1 - p]).log().expand(max(1, setting.draws), 3, 2)
        keep(setting, tmp_path, "held_out", logits.contiguous(), labels)
    names = [setting.name for setting in chosen(tmp_path, list(found.values()))]
    assert names == [name for name in found if "×" not in name] + ["prefix 4 ×2"]


def scored(folder, found, labels, held_labels):
    """Writes logits of noise and a hint at the labels 0, 1, 2, 0, …, and scores them."""
    for part, own in (("evaluation", labels), ("held_out", held_labels)):
        for number, setting in enumerate(found.values()):
            generator = torch.Generator().manual_seed(100 * number + (part == "evaluation"))
            hint = 3.0 * (torch.arange(3) == torch.arange(len(own))[:, None] % 3)
            noise = torch.randn(max(1, setting.draws), len(own), 3, generator=generator)
            keep(setting, folder, part, hint + 3 * noise, own)
    lines = score(folder, list(found.values()), {"prefix 1": 1.5}, 20)["lines"]
    return {line["name"]: line for line in lines}


def test_lines_of_fewer_draws_are_the_first_draws(tmp_path):
    found = settings(factors=[])
    labels = torch.arange(40) % 3
    lines = scored(tmp_path, found, labels, labels)
    logits, _ = kept(tmp_path, found["exact 10"], "evaluation")
    assert [name for name in lines if "exact" in name] == [f"exact {count}" for count in COUNTS]
    for count in COUNTS:
        expected = row_nll(logits[:count], labels).mean().item()
        assert lines[f"exact {count}"]["nll"] == pytest.approx(expected)
    assert [lines[name]["cost"] for name in ("prefix 1", "mean")] == [1.5, None]
    assert lines["mean"]["share"] == lines["mean"]["share_high"] == 0
    assert lines["exact 10"]["share"] == lines["exact 10"]["share_low"] == 1
    gain = lines["mean"]["nll"] - lines["prefix 1"]["nll"]
    full = lines["mean"]["nll"] - lines["exact 10"]["nll"]
    assert lines["prefix 1"]["share"] == pytest.approx(gain / full)
    few = scored(tmp_path, settings(factors=[], draws=3), labels, labels)
    assert [name for name in few if "exact" in name] == ["exact 1", "exact 2", "exact 3"]


def test_the_temperature_is_the_held_out_rows_best_and_used_on_evaluation_rows(tmp_path):
    found = settings(factors=[])
    labels = torch.arange(40) % 3
    held = torch.arange(30) % 3
    line = scored(tmp_path, found, labels, held)["prefix 1"]
    logits, _ = kept(tmp_path, found["prefix 1"], "evaluation")
    held_out, _ = kept(tmp_path, found["prefix 1"], "held_out")
    temperature = line["tempered"]["temperature"]
    assert abs(math.log(temperature)) > 0.2
    least = row_nll(held_out / temperature, held).mean()
    for by in (0.97, 1.03):
        assert row_nll(held_out / (temperature * by), held).mean() > least
    assert line["nll"] == pytest.approx(row_nll(logits, labels).mean().item())
    expected = row_nll(logits / temperature, labels).mean().item()
    assert line["tempered"]["nll"] == pytest.approx(expected)


def test_cost_is_the_median_of_turns_in_passes_of_the_mean(tmp_path):
    assert calibration_cost.read_cost(tmp_path) == ({}, {})
    seconds = {"mean": [1.0, 4.0, 2.0], "exact 10": [9.0, 4.0, 2.0]}  # the ratio of medians is 2
    tensors = {name: torch.tensor(values) for name, values in seconds.items()}
    save_file(tensors, tmp_path / "cost.safetensors", {"threads": "1"})
    costs, where = calibration_cost.read_cost(tmp_path)
    assert costs == {"mean": 1.0, "exact 10": 1.0}
    assert where == {"threads": "1"}


# Parts, on a tiny model


@pytest.fixture
def subject(llama, byte_level, tiny_task):
    """A Gaussian with much noise on three blocks and the head, and a task's rows."""
    model = attach(llama(num_hidden_layers=3, initializer_range=0.3), Lora(rank=2))
    bayesify(model, init_root_std=0.7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    scorer = LetterScorer(byte_level, tiny_task)
    rows = {"evaluation": scorer.encode(tiny_task.evaluation)}
    return calibration_cost.Subject(Gaussian(model, scorer), scorer, rows, {}, bf16=False)


def test_scaled_multiplies_the_standard_deviation_and_restores_it(subject):
    layers = Slots(subject.posterior.model).of_kind(GaussianLinear)
    drawn = subject.posterior.draw(3)
    before = {name: layer.root_std.detach().clone() for name, layer in layers.items()}

    def fail():
        with calibration_cost.scaled(subject.posterior, 3.0):
            again = subject.posterior.draw(3)
            for name, layer in layers.items():
                noise = drawn[name] - layer.weight
                assert torch.allclose(again[name] - layer.weight, 3 * noise, atol=1e-5)
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fail()
    assert all(torch.equal(layer.root_std, before[name]) for name, layer in layers.items())


@pytest.mark.parametrize(("blocks", "drawn"), [(1, {2}), (2, {1, 2}), (5, {0, 1, 2})])
def test_only_the_last_blocks_are_drawn(subject, blocks, drawn):
    draw = subject.drawn_as(Setting(BLOCKS, 3, blocks)).draw(4, seed=1)
    whole = subject.posterior.draw(4, seed=1)
    assert {calibration_cost.block_of(name) for name in draw} == drawn
    assert {calibration_cost.block_of(name) for name in whole} == {-1, 0, 1, 2}
    assert all(torch.equal(draw[name], whole[name]) for name in draw)


def test_logits_are_those_of_the_setting(subject):
    rows = subject.rows["evaluation"]
    exact = subject.logits(Setting(EXACT, 3), rows, 2)
    prefix = subject.logits(Setting(PREFIX, 3, 4), rows, 2)
    for logits, draws in ((exact, Draws(3)), (prefix, Draws(3, shared_prefix=4))):
        alone = row_logits(subject.posterior, subject.scorer, rows, draws, batch_size=2)
        assert torch.equal(logits, alone)
    blocks = subject.logits(Setting(BLOCKS, 3, 2), rows, 2)
    narrow = subject.logits(Setting(EXACT, 3, factor=0.01), rows, 2)
    spread = [logits[..., :3].std(0).mean() for logits in (narrow, blocks, exact)]
    assert 0 < 20 * spread[0] < spread[2]
    assert 0 < spread[1] < spread[2]


# All steps

TINY = (
    "--rows 5 --batch 2 --draws 3 --prefixes 2 --blocks 1 --factors 2 --factors_for 2 "
    "--turns 2 --resamples 20"
)
FIT = "--steps 2 --batch_size 2 --lora.rank 2 --learning_rate 0.1 --progress false"
PLAIN = ["mean", "exact 3", "prefix 2", "blocks 1"]


@pytest.fixture
def fitted(llama, byte_level, tmp_path):
    """Fits a method for two steps; returns the options that every step needs."""
    model = write_model(tmp_path / "model", llama(initializer_range=0.3), byte_level)
    data = write_arc(tmp_path / "data", train=16, validation=7, options=(3, 4))
    same = ["--model", model, "--task", "arc_easy", "--data_root", data]
    same = [*map(str, same), "--train_rows", "8", "--holdout", "0.25"]

    def fit(method, *more):
        folder = str(tmp_path / method)
        own = ["--method", method, "--output", folder, *FIT.split(), *more]
        assert bayestune(["fit", *same, *own]) == 0
        kept = str(tmp_path / "kept")
        return [*same, "--posterior", folder, "--output", kept, *TINY.split()]

    return fit


def test_collect_cost_and_table(fitted, tmp_path):
    options = fitted("blob", "--blob.init_root_std", "0.7", "--blob.prior_std", "1.0")
    folder = tmp_path / "kept"
    calibration_cost.main(["collect", *options])
    logits, _ = kept(folder, Setting(PREFIX, 3, 2), "evaluation")
    assert logits.shape == (3, 5, 4)
    assert set(logits.isfinite().sum(-1).flatten().tolist()) == {3, 4}
    files = {path: path.read_bytes() for path in folder.iterdir()}
    lost = folder / "evaluation-prefix-2.safetensors"
    lost.unlink()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    calibration_cost.main(["collect", *options])  # goes on where it was cut off
    assert {path: path.read_bytes() for path in folder.iterdir()} == files
    assert all(path.stat().st_mtime_ns == before[path] for path in before)

    calibration_cost.main(["cost", *options])
    seconds = load_file(folder / "cost.safetensors")
    assert sorted(seconds) == sorted([*PLAIN, "exact 1", "exact 2"])
    file, page, picture = (tmp_path / name for name in ("a.jsonl", "docs/a.md", "docs/a.png"))
    shown = ["--json", str(file), "--page", str(page), "--picture", str(picture)]
    calibration_cost.main(["table", *options, *shown])
    (record,) = calibration_page.read(file)
    assert (record["task"], record["n"], record["held_out"]) == ("arc_easy", 5, 4)
    names = [line["name"] for line in record["lines"] if line["factor"] == 1]
    assert names == ["mean", "exact 1", "exact 2", *PLAIN[1:]]
    text = page.read_text(encoding="utf-8")
    assert "dtype float32 · precision fp32 · batch 2" in text
    assert all(f"| {name} | " in text for name in names)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_measured_is_refused(fitted, capsys):
    options = fitted("blob")
    with pytest.raises(ValueError, match=r"no held-out rows: got holdout=0\.0, expected a part of"):
        calibration_cost.main(["collect", *options, "--holdout", "0.0"])
    with pytest.raises(ValueError, match="got 5 evaluation rows, expected 6 or more; lower --bat"):
        calibration_cost.main(["cost", *options, "--batch", "6"])
    with pytest.raises(SystemExit):
        calibration_cost.main(["table", *options, "--page", "page.md"])
    assert "--page and --picture show the records of --json" in capsys.readouterr().err
    with pytest.raises(ValueError, match="got a Point, expected a Gaussian posterior: fit BLoB"):
        calibration_cost.main(["collect", *fitted("mle")])


# The page

RECORDS = calibration_page.read(ROOT / "results/calibration_cost/records.jsonl")


def test_the_committed_page_is_what_the_records_give():
    page = (ROOT / "docs/calibration_cost.md").read_text(encoding="utf-8")
    assert calibration_page.page(RECORDS) == page
    (line,) = [line for line in page.splitlines() if line.startswith("| exact 5 | 4.66")]
    assert line.split(" | ")[2:5] == ["1.260", "51 [19, 71]", "14.8"]


def test_a_task_has_one_record_for_a_model(tmp_path):
    file = tmp_path / "runs.jsonl"
    first, *others = RECORDS
    large = {**first, "model": "large"}
    for record in (first, *others, large, {**first, "n": 7}):
        calibration_page.append(record, file)
    assert calibration_page.read(file) == [*others, large, {**first, "n": 7}]


def test_points_of_the_picture_are_the_lines():
    upper, _ = calibration_page.figure_of(RECORDS[:1]).axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in upper.get_lines()}
    exact = [line for line in RECORDS[0]["lines"] if line["kind"] == "exact"]
    assert drawn["exact draws"] == sorted([line["cost"], line["nll"]] for line in exact)
