"""Sets: exact quantiles, coverage over simulated rows, rows of unlike numbers of options."""

import math
import re

import pytest
import torch

from bayestune.decisions import SetRule, fit_sets, option_scores, row_uniforms
from bayestune.decisions.sets import check_set_rows

KINDS = ("lac", "aps", "aps_inclusive")


def some_rows(count, g):
    truth = (1.5 * torch.randn(count, 5, generator=g, dtype=torch.float64)).softmax(-1)
    labels = torch.multinomial(truth, 1, generator=g)[:, 0]
    return truth.square() / truth.square().sum(-1, keepdim=True), truth, labels  # overconfident


def test_scores_by_hand():
    p = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64)
    u = torch.tensor([0.25], dtype=torch.float64)
    expected = {
        "lac": [0.8, 0.5, 0.7],
        "aps_inclusive": [1.0, 0.5, 0.8],
        "aps": [0.8 + 0.75 * 0.2, 0.75 * 0.5, 0.5 + 0.75 * 0.3],
    }
    for kind, values in expected.items():
        assert option_scores(p, kind, u)[0].tolist() == pytest.approx(values)


def test_the_quantile_is_an_order_statistic():
    own = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    p = torch.stack([1 - own, own], -1)
    labels = torch.zeros(19, dtype=torch.long)
    assert fit_sets(p, labels, coverage=0.9).quantile == pytest.approx(own[17].item())  # ⌈20·0.9⌉
    assert fit_sets(p, labels, coverage=0.95).quantile == pytest.approx(own[18].item())
    with pytest.raises(ValueError, match=r"got 19 rows for sets of coverage 0.96; expected 24 or"):
        fit_sets(p, labels, coverage=0.96)


@pytest.mark.parametrize("kind", KINDS)
def test_coverage(kind):
    """Mean coverage of n = 50 rows: 1 − α to 1 − α + 1/(n + 1) but for the inclusive kind."""
    g = torch.Generator().manual_seed(0)
    covered = []
    for _ in range(300):
        p, _, labels = some_rows(50, g)
        rule = fit_sets(p, labels, kind, 0.8, torch.rand(50, generator=g))
        p, truth, _ = some_rows(200, g)
        sets = rule.sets(p, ties=torch.rand(200, generator=g))
        covered.append((truth * sets).sum(-1).mean())
    cover = torch.stack(covered)
    error = 3 * (cover.std() / math.sqrt(len(cover))).item()
    assert cover.mean() >= 0.8 - error
    assert cover.mean() <= 0.8 + 1 / 51 + error


def test_options_a_row_lacks_are_never_inside_and_count_for_nothing():
    p = torch.tensor([[0.7, 0.3, 0.0], [0.5, 0.3, 0.2]], dtype=torch.float64)
    everything = SetRule("lac", 0.9, 1.0, 100)
    options = torch.tensor([[True, True, False], [True, True, True]])
    assert everything.sets(p, options).sum(-1).tolist() == [2, 3]
    assert everything.sets(p).sum(-1).tolist() == [2, 3]
    narrow = p[:1, :2]
    for kind in KINDS:
        u = torch.tensor([0.5])
        assert torch.equal(option_scores(p[:1], kind, u)[:, :2], option_scores(narrow, kind, u))


def test_a_row_always_gets_the_same_number():
    contents = [f"row {index}" for index in range(2000)]
    values = row_uniforms(contents)
    assert torch.equal(values, row_uniforms(contents[::-1]).flip(0))
    assert values.mean().item() == pytest.approx(0.5, abs=0.02)
    assert values.var().item() == pytest.approx(1 / 12, abs=0.005)


def test_refusals():
    p = torch.full((20, 2), 0.5)
    labels = torch.zeros(20, dtype=torch.long)
    with pytest.raises(ValueError, match='got "aps" without ties'):
        fit_sets(p, labels, "aps")
    with pytest.raises(ValueError, match="got sets 'raps'; expected one of"):
        fit_sets(p, labels, "raps")
    with pytest.raises(ValueError, match="got coverage=1; expected a share between 0 and 1"):
        fit_sets(p, labels, coverage=1)


@pytest.mark.parametrize("rows", range(2, 60))
def test_the_coverage_that_a_refusal_names_is_not_refused(rows):
    with pytest.raises(ValueError, match="or ask for") as refused:
        check_set_rows(rows, 0.999)
    check_set_rows(rows, float(re.search(r"ask for ([\d.]+) or", str(refused.value))[1]))
