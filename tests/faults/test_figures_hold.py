"""Intervals cover, p-values have their size, and figures say no more than their rows do."""

import math
import re
from pathlib import Path

import pytest
import torch

from bayestune import metrics
from bayestune.curvature.factors import LowRankSum
from bayestune.data import Question
from bayestune.evaluation import Adaptive, EvaluationOptions, make_result
from bayestune.evaluation.adaptive import in_rounds
from bayestune.evaluation.evaluate import Evaluated
from bayestune.metrics import PairedDifference, paired_bootstrap, summarise
from bayestune.metrics.proportions import share_interval
from bayestune.posteriors import Prediction
from bayestune.report import grid_tables, render, renewed, summary_tables
from bayestune.report.claims import Evaluation, paired_table, sentence
from bayestune.report.columns import ACCURACY, BRIER, NLL
from bayestune.whole_files import read_json_lines
from report.recorded import evaluated, record, row, shown, with_rows
from studies import coverage, coverage_page

RESULTS = Path(__file__).parents[2] / "results"


def rows_of(n, generator, spread=1.5, temperature=1.0):
    """Probabilities of four classes, and labels of softmax(logits/temperature)."""
    logits = spread * torch.randn(n, 4, generator=generator, dtype=torch.float64)
    labels = torch.multinomial((logits / temperature).softmax(1), 1, generator=generator)[:, 0]
    return logits.softmax(1), labels


# Intervals, by simulation: within 4 binomial standard errors of 0.90 … 0.99


def within(covered, sims, least=0.90):
    share = covered / sims
    return share >= least - 4 * math.sqrt(least * (1 - least) / sims)


@pytest.mark.parametrize(
    ("spread", "temperature"), [(1.5, 1.0), (3.0, 2.5), (7.0, 1.0)], ids=["good", "bad", "sure"]
)
def test_printed_intervals_cover_at_n_50(spread, temperature):
    generator = torch.Generator().manual_seed(5)
    whole = rows_of(300_000, generator, spread, temperature)
    truth = {key: getattr(metrics, key)(*whole) for key in ("accuracy", "nll", "brier", "ece")}
    if temperature == 1:
        truth["ece"] = 0.0
    covered = dict.fromkeys(truth, 0)
    small = 0
    for _ in range(60):
        found = summarise(*rows_of(50, generator, spread, temperature), resamples=300)
        for key, true in truth.items():
            interval = found[key]
            assert interval.low <= interval.value <= interval.high
            covered[key] += interval.low <= true <= interval.high
        small += found["ece_if_calibrated"].p_value <= 0.05
    assert all(within(count, 60) for count in covered.values()), covered
    if temperature == 1:
        assert small / 60 < 0.05 + 4 * math.sqrt(0.05 * 0.95 / 60)


def test_the_percentile_interval_of_ece_would_not_have():
    generator = torch.Generator().manual_seed(6)
    held = 0
    for _ in range(20):
        p, y = rows_of(200, generator)
        drawn = torch.randint(200, (100, 200), generator=generator)
        values = torch.tensor([metrics.ece(p[rows], y[rows]) for rows in drawn])
        held += values.quantile(0.025).item() <= 0
        assert summarise(p, y, resamples=10)["ece"].low < 0.05
    assert held == 0


@pytest.mark.parametrize("share", [0.9, 0.97, 0.99, 0.995, 0.999])
def test_the_interval_of_accuracy_covers_exactly(share):
    for n in (50, 200):
        chance = 0.0
        for right in range(n + 1):
            low, high = share_interval(right, n, 0.95)
            if low <= share <= high:
                chance += math.comb(n, right) * share**right * (1 - share) ** (n - right)
        assert 0.92 < chance < 0.995


def test_paired_p_values_have_their_size():
    generator = torch.Generator().manual_seed(7)
    small = dict.fromkeys(("accuracy", "nll", "brier"), 0)
    for _ in range(100):
        p, y = rows_of(50, generator)
        q = (p.log() + 0.7 * torch.randn(p.shape, generator=generator)).softmax(1)
        coin = torch.rand(50, 1, generator=generator) < 0.5
        first, second = torch.where(coin, p, q), torch.where(coin, q, p)
        for key in small:
            small[key] += paired_bootstrap(first, second, y, key, 200).p_value <= 0.05
    most = 0.07 + 4 * math.sqrt(0.05 * 0.95 / 100)
    assert all(count / 100 <= most for count in small.values()), small


@pytest.mark.slow
def test_the_study_has_records_and_its_page_is_theirs():
    records = read_json_lines(RESULTS / "coverage/records.jsonl")
    assert {one["n"] for one in records} == set(coverage.NUMBERS)
    printed = {"accuracy", "nll", "brier", "ece", "difference accuracy", "difference nll"}
    for one in records:
        assert one["value_outside"] == 0
        for key in printed:
            assert within(one["covered"][key], one["printed"][key]), (one["setting"], one["n"], key)
    text = coverage.PAGE.read_text(encoding="utf-8")
    assert text == coverage_page.page(records), "run python -m studies.coverage"


def test_rows_in_one_bin_do_not_prove_calibration():
    p = torch.tensor([[0.7, 0.3]] * 100)
    chance = summarise(p, torch.tensor([0] * 70 + [1] * 30), resamples=10)["ece"]
    assert chance.value == pytest.approx(0, abs=1e-6)
    assert 0.08 < chance.high < 0.11  # of 100 rows, accuracy is known to ±0.09
    sure = summarise(torch.eye(2)[[0] * 30], torch.zeros(30, dtype=torch.long), resamples=10)
    assert sure["ece"].high == pytest.approx(1 - sure["accuracy"].low)


def test_equal_losses_have_no_interval():
    for p in (torch.tensor([[0.7, 0.3]] * 30), torch.eye(2, dtype=torch.float64)[[1] * 30]):
        found = summarise(p, torch.zeros(30, dtype=torch.long), resamples=50)
        assert found["nll"].low is found["brier"].high is None


# Mutual information


def test_mutual_information_of_few_draws_is_that_of_many():
    generator = torch.Generator().manual_seed(8)
    logits = torch.randn(400, 3, generator=generator) + 0.5 * torch.randn(
        20, 400, 3, generator=generator
    )
    many = Prediction.of(logits).mutual_information.mean().item()
    for count in (2, 5, 10):
        few = torch.stack(
            [
                Prediction.of(logits[start : start + count]).mutual_information.mean()
                for start in range(0, 20, count)
            ]
        )
        assert few.mean().item() == pytest.approx(many, rel=0.04)
    exact = Prediction.of(logits[:2], exact=True)
    assert exact.mutual_information.mean().item() < 0.6 * many


def test_adaptive_rows_have_the_factor_of_their_own_draws():
    generator = torch.Generator().manual_seed(9)
    logits = 2 * torch.randn(30, 3, generator=generator) + torch.randn(
        10, 30, 3, generator=generator
    )
    found = in_rounds(lambda rows, part: logits[part.start : part.stop, rows], 30, Adaptive(10))
    assert len(found.draws_used.unique()) > 1
    for i, used in enumerate(found.draws_used.tolist()):
        plain = Prediction.of(logits[:used, i : i + 1])
        assert found.mutual_information[i].item() == pytest.approx(
            plain.mutual_information.item(), abs=1e-12
        )
        torch.testing.assert_close(found.log_probabilities[i], plain.log_probabilities[0])


# NLL


def test_nll_has_no_clip_in_records():
    logits = torch.tensor([[[0.0, 2000.0], [0.0, 1.0]], [[0.0, 1500.0], [0.0, 1.0]]])
    questions = [Question(str(i), "?", ("a", "b"), 0) for i in range(2)]
    made = make_result(
        {}, questions, Evaluated(2, Prediction.of(logits), 0, 2), EvaluationOptions()
    )
    first, second = (row["nll"] for row in made.rows)
    assert first == pytest.approx(1500 + math.log(2))
    assert made.record["metrics"]["nll"]["value"] == pytest.approx((first + second) / 2)


# Reports


def test_old_records_are_read_and_renewed(tmp_path):
    old = evaluated(tmp_path, "MLE")
    old["metrics"] = {
        **record("x", accuracy=0.5, ece=0.1)["metrics"],
        "ece_debiased": {"value": 0.05, "low": 0.06, "high": 0.2},
    }
    (new,) = renewed([old], tmp_path)
    assert new["metrics"]["ece"]["low"] <= new["metrics"]["ece"]["value"]
    assert new["metrics"]["ece_if_calibrated"]["p_value"] > 0
    assert renewed([new], tmp_path) == [new]
    assert "debiased" not in render(summary_tables([old]) + grid_tables([old]))
    assert "ECE if calibrated" in render(grid_tables([old], tmp_path, 20))
    assert "[9.0, 11.0]" not in render(summary_tables([old]))
    (tmp_path / old["predictions"]).unlink()
    assert renewed([old], tmp_path) == [old]


def test_what_is_printed_as_nothing_is_not_called_a_gain():
    better = {
        ACCURACY: PairedDifference(0.0004, 0.0001, 0.0007, 0.01, 9000),
        NLL: PairedDifference(-0.0002, -0.0003, -0.0001, 0.01, 9000),
        BRIER: PairedDifference(-0.2, -0.3, -0.1, 0.01, 9000),
    }
    one, two = (Evaluation(name, record(name), ()) for name in "ab")
    said = sentence(one, two, better)
    assert "accuracy (by less than 0.1 points)" in said
    assert "NLL (by less than 0.001)" in said
    table = paired_table([(two, better)])
    marks = [cell.mark for cell in table.blocks[0].lines[0][1]]
    assert marks == ["", "", "", "better"]


def test_a_tie_is_right_or_wrong_everywhere_on_the_page(tmp_path):
    rows = [row(i, [0.5, 0.5], 1) for i in range(6)]
    (run,) = shown([with_rows(tmp_path, rows, "MLE", accuracy=0.0)], tmp_path)["runs"]
    assert run["classes"]["counts"] == [[0, 0], [6, 0]]  # the first of equals, as accuracy has it
    assert sum(run["histograms"]["total_entropy"]["wrong"]) == 6
    assert {dot[2] for dot in run["cloud"]} == {0}
    assert run["coverage"]["points"][-1] == [1.0, 1.0]


def test_a_colour_of_the_page_has_one_meaning(tmp_path):
    records = [evaluated(tmp_path, "MLE", 6.0, n=400), evaluated(tmp_path, "BLoB", n=400)]
    data = shown(records, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    style = page.split("<style>")[1].split("</style>")[0]
    uses = [
        line.strip() for line in style.splitlines() if re.search(r"var\(--(right|wrong|b)", line)
    ]
    assert [re.sub(r" \{.*", "", line) for line in uses if "band" not in line] == [
        ".better",
        ".tag.right",
    ]
    assert data["runs"][1]["paired"]["nll"][4] == 1
    assert "where a perfectly calibrated model would score" in data["words"][0]


def test_the_error_of_low_rank_factors_is_what_the_note_says():
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(160, 160, generator=generator, dtype=torch.float64)).Q
    errors = {}
    for power in (0.5, 1.0):
        spectrum = torch.arange(1, 161, dtype=torch.float64) ** (-power / 2)
        rows = torch.randn(1200, 160, generator=generator, dtype=torch.float64) * spectrum @ turn.T
        total = LowRankSum(160, 10, rows.new_empty(0))
        for part in rows.split(40):
            total.add(part)
        true = torch.linalg.eigvalsh(rows.T @ rows).flip(0)[:10]
        errors[power] = 1 - total.eigen()[1] / true
    assert 0.03 < errors[0.5].mean() < 0.10
    assert errors[0.5].max() < 0.26
    assert errors[1.0].mean() < 0.015
