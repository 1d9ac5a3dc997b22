import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from bayestune.adapters import RowGroups, Slots, TrainingPasses, make_ranks_random, put_means
from bayestune.kl import kl_weights, warmup_decay
from bayestune.methods import ScalaBL
from bayestune.methods.scalabl import SingularLinear, factor_kl, factor_kl_step_, std_after
from bayestune.training import start_adapter
from promises import TRAINING

singular = partial(SingularLinear, init_std=0.05)


def layer(rank=4, width=16, std=0.05, size=1):
    torch.manual_seed(0)
    return SingularLinear(nn.Linear(width, rank, bias=False), TrainingPasses(RowGroups(size)), std)


def test_the_decomposition_keeps_a_up_to_a_turn_of_its_ranks():
    torch.manual_seed(0)
    plain = nn.Linear(16, 4, bias=False)
    before = plain.weight.detach().clone()
    turn = torch.linalg.svd(before)[0]
    made = singular(plain, TrainingPasses())
    torch.testing.assert_close(made.weight @ made.weight.T, torch.eye(4), atol=1e-5, rtol=0)
    kept = made.log_mean.exp() * made.weight
    torch.testing.assert_close(turn @ kept, before, atol=1e-5, rtol=1e-5)
    std = made.log_std.exp()
    assert ((0.05 / math.sqrt(2) <= std) & (std <= 0.05)).all()


def test_the_kl_is_torchs_and_its_step_goes_down_its_gradient():
    torch.manual_seed(1)
    log_mean, log_std = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    kl = factor_kl(log_mean, log_std)
    expected = kl_divergence(Normal(log_mean.exp(), log_std.exp()), Normal(0.0, 1.0)).sum()
    torch.testing.assert_close(kl, expected, rtol=1e-12, atol=0)
    kl.backward()
    moved = [value.detach().clone() for value in (log_mean, log_std)]
    factor_kl_step_(*moved, step=0.01)
    for after, before in zip(moved, (log_mean, log_std), strict=True):
        torch.testing.assert_close(after, before.detach() - 0.01 * before.grad, rtol=1e-12, atol=0)


def test_training_draws_have_the_moments_and_evaluation_is_the_mean():
    made, count = layer(std=0.3), 20000
    mean, std = made.mean_factors.detach(), made.log_std.exp().detach()[:, 0]
    inputs = torch.ones(1, 1, 16).expand(count, 1, 16)
    through = nn.functional.linear(inputs[0, 0], made.weight).detach()
    outputs = made.train()(inputs).detach()[:, 0] / through
    assert ((outputs.mean(0) - mean).abs() < 4.5 * std / math.sqrt(count)).all()
    assert ((outputs.std(0) / std - 1).abs() < 4.5 / math.sqrt(2 * count)).all()
    assert (torch.corrcoef(outputs.T) - torch.eye(4)).abs().max() < 4.5 / math.sqrt(count)
    torch.testing.assert_close(made.eval()(inputs[0]), (mean * through).expand(1, 4))


def test_the_sequences_of_a_row_and_its_tokens_share_the_draw():
    made = layer(std=0.3, size=3).train()
    through = nn.functional.linear(torch.ones(16), made.weight)
    factors = (made(torch.ones(6, 5, 16)) / through).detach()
    for row in (factors[:3], factors[3:]):
        torch.testing.assert_close(row, row[:1, :1].expand_as(row))
    assert not torch.allclose(factors[0], factors[3])
    with pytest.raises(ValueError, match="the batch does not divide into rows: got 5 sequences"):
        made(torch.ones(5, 2, 16))


def test_the_mean_is_put_back_as_a_plain_layer(case):
    model = start_adapter(case.make(), TRAINING)
    layers = make_ranks_random(model, singular)
    assert len({id(made.passes) for made in layers.values()}) == 1
    name, made = next(iter(layers.items()))
    inputs = torch.randn(2, 3, made.in_features)
    expected = made.eval()(inputs)
    put_means(model, layers)
    plain = Slots(model).modules()[name]
    assert type(plain) is nn.Linear
    torch.testing.assert_close(plain(inputs), expected)


def test_the_posteriors_draws_are_gaussian_along_the_directions(case):
    posterior, count = case.fit(ScalaBL(schedule="constant", kl_lr=5.0)), 1000
    name = next(iter(posterior.factors))
    mean, std = posterior.slots.weights()[name], posterior.factors[name][:, 0]
    direction = posterior.directions[name]
    draws = torch.stack([posterior.draw(i)[name] for i in range(count)])
    widest = direction.abs().argmax(1, keepdim=True).expand(count, -1, 1)
    noise = ((draws - mean) / direction).gather(2, widest)
    assert (noise.mean(0)[:, 0].abs() < 4.5 * std / math.sqrt(count)).all()
    assert ((noise.std(0)[:, 0] / std - 1).abs() < 4.5 / math.sqrt(2 * count)).all()
    torch.testing.assert_close(draws, noise * direction + mean, atol=1e-5, rtol=0)


@pytest.mark.parametrize("schedule", ["constant", "bursts"])
def test_without_a_likelihood_the_run_is_the_kls_descent(case, schedule):
    still = {"learning_rate": 0.0, "batch_size": 2, "accumulation": 2, "warmup_ratio": 0.25}
    posterior = case.fit(ScalaBL(schedule=schedule, kl_lr=0.2), **still)
    layers = make_ranks_random(start_adapter(case.make(), replace(TRAINING, **still)), singular)
    weights = kl_weights(8, int(100 * 12 ** (math.pi / 8) / 4), schedule)
    for name, made in layers.items():
        mean, std = made.log_mean.detach().double(), made.log_std.detach().double()
        for step in 0.2 * weights * warmup_decay(8, 0.25):
            mean, std = mean - step * mean.exp() ** 2, std - step * (std.exp() ** 2 - 1)
        torch.testing.assert_close(posterior.factors[name].double(), std.exp(), rtol=1e-5, atol=0)
        norms = posterior.slots.weights()[name].norm(dim=1).double()
        torch.testing.assert_close(norms, mean.exp()[:, 0], rtol=1e-5, atol=0)
    assert {"kl", "loss"} <= set(posterior.report.history[0])


@pytest.mark.parametrize("end", [None, 0.3])
def test_the_kl_ends_at_final_std(case, end):
    still = {"learning_rate": 0.0, "steps": 40, "warmup_ratio": 0.1}
    posterior = case.fit(ScalaBL(final_std=end), **still)
    stds = torch.cat([std.flatten() for std in posterior.factors.values()])
    assert stds.mean().item() == pytest.approx(end or 0.9, rel=0.06)  # starts are random


@pytest.mark.parametrize(
    ("rows", "at_published_rate", "rate"),
    [(640, 0.20, 0.49), (4957, 0.08, 1.2), (9427, 0.07, 1.53)],
)
def test_the_published_rate_is_another_method(rows, at_published_rate, rate):
    facts = (5000, int(100 * rows ** (math.pi / 8) / 4), 0.06)
    published = ScalaBL(kl_lr=0.2, schedule="bursts").kl_steps(*facts)
    assert std_after(published.tolist(), 0.05) == pytest.approx(at_published_rate, abs=0.006)
    solved = ScalaBL(schedule="bursts").kl_steps(*facts)
    assert std_after(solved.tolist(), 0.05) == pytest.approx(0.9, abs=1e-4)
    assert (solved.max() / published.max() * 0.2).item() == pytest.approx(rate, rel=0.04)


def test_sigma_rises_early_under_the_default():
    steps = ScalaBL().kl_steps(150, 280, 0.06).tolist()
    assert std_after(steps[:75], 0.05) > 0.5
    with pytest.raises(ValueError, match="in the last steps alone: got 150 steps, expected a per"):
        ScalaBL(schedule="bursts").kl_steps(150, 280, 0.06)


@pytest.mark.parametrize(
    "change", [{"init_std": 0.0}, {"kl_lr": -1.0}, {"final_std": 0.04}, {"final_std": 1.0}]
)
def test_values_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match="out of range: got ScalaBL.*expected init_std > 0"):
        ScalaBL(**change)
    with pytest.raises(ValueError, match="got final_std=0.5 and kl_lr=0.2; expected one of them"):
        ScalaBL(final_std=0.5, kl_lr=0.2)


def test_more_ranks_than_inputs_are_refused():
    message = r"A has more ranks than inputs: got \(4, 3\), expected at most rank 3"
    with pytest.raises(ValueError, match=message):
        layer(rank=4, width=3)
