"""When the KL is taken: the paper's bursts, and transformers' warm-up and decay."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import get_linear_schedule_with_warmup

from bayestune.kl import burst_period, kl_weights, warmup_decay


@pytest.mark.parametrize("period", [1, 3, 60])
def test_bursts_are_the_papers_weights_and_take_about_one_kl_a_period(period):
    weights = kl_weights(2 * period, period)
    exact = [2**i / (2 ** (period + 1) - 1) for i in range(1, period + 1)]
    assert_close(weights, torch.tensor(exact * 2, dtype=torch.float64))
    assert weights[:period].sum().item() == pytest.approx(1, abs=2.0**-period)
    assert kl_weights(2 * period, period, "constant")[:period].sum().item() == pytest.approx(1)


def test_a_long_period_does_not_overflow():
    weights = kl_weights(5000, 5000)
    assert weights.isfinite().all()
    assert weights[-1].item() == pytest.approx(0.5)


def test_a_period_is_the_authors_and_at_least_one_step():
    assert burst_period(640, 4) == 316
    assert burst_period(1119, 4) == 393
    assert burst_period(1, 1000) == 1


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="unknown schedule: got 'burst', expected one of"):
        kl_weights(3, 2, "burst")


def test_the_multiplier_is_transformers_linear_schedule():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
    schedule = get_linear_schedule_with_warmup(optimizer, int(0.06 * 50), 50)
    rates = []
    for _ in range(50):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert_close(warmup_decay(50), torch.tensor(rates, dtype=torch.float64))
    assert warmup_decay(10, 0.0)[0] == 1
