import math

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, kl_divergence

from bayestune.adapters import TrainingPasses
from bayestune.methods import DALorRA
from bayestune.methods.dalorra import GatedLinear, GateKL, gate_kl, gate_kl_gradient


def layer(kept=0.5, temperature=0.5):
    torch.manual_seed(0)
    return GatedLinear(nn.Linear(16, 4, bias=False), TrainingPasses(), kept, temperature)


def test_the_kl_is_torchs_and_the_closed_gradient_is_autograds():
    torch.manual_seed(0)
    logit = (3 * torch.randn(6, dtype=torch.float64)).requires_grad_()
    kl = gate_kl(logit, 0.2)
    prior = Bernoulli(torch.tensor(0.2, dtype=torch.float64))
    expected = kl_divergence(Bernoulli(logits=logit), prior).sum()
    torch.testing.assert_close(kl, expected, rtol=1e-9, atol=0)
    kl.backward()
    torch.testing.assert_close(gate_kl_gradient(logit, 0.2), logit.grad, rtol=1e-9, atol=1e-12)
    assert gate_kl(torch.zeros(3), 0.5).item() == pytest.approx(0, abs=1e-7)
    assert gate_kl(torch.tensor([40.0, -40.0]), 0.5).isfinite()


# sharper gates are nearer to 0 and 1: the mean of z(1 − z) grows with the temperature
@pytest.mark.parametrize(
    ("temperature", "low", "high"), [(0.05, 0.0, 0.01), (0.5, 0.05, 0.09), (2.0, 0.15, 0.25)]
)
def test_a_relaxed_gate_is_open_with_its_probability(temperature, low, high):
    count = 20000
    made = layer(0.8, temperature)
    gates = made.factors(made.noise(count)).detach()
    error = math.sqrt(0.8 * 0.2 / count)
    assert ((gates > 0.5).float().mean(0) - 0.8).abs().max() < 4.5 * error
    assert (torch.corrcoef(gates.T) - torch.eye(4)).abs().max() < 4.5 / math.sqrt(count)
    assert low < gates.mul(1 - gates).mean() < high


def test_the_relaxations_gradient_is_that_of_its_noise_held_fixed():
    made = layer(0.6, 0.7).double()
    torch.manual_seed(3)
    gates = made.factors(made.noise(5))
    (gradient,) = torch.autograd.grad(gates.sum(), made.gate_logit)
    torch.testing.assert_close(gradient, (gates * (1 - gates)).sum(0)[:, None] / 0.7)


def test_training_gates_the_ranks_row_by_row_and_evaluation_is_the_mean():
    made, inputs = layer(0.7), torch.randn(3, 5, 16)
    plain = nn.functional.linear(inputs, made.weight)
    torch.manual_seed(1)
    gates = made.factors(made.noise(3))
    torch.manual_seed(1)
    torch.testing.assert_close(made.train()(inputs), plain * gates[:, None])
    torch.testing.assert_close(made.eval()(inputs), plain * 0.7)


@pytest.mark.parametrize("before", [None, 1.0])
def test_the_kls_gradient_is_added_before_the_step(before):
    made = layer(0.9)
    made.gate_logit.grad = None if before is None else torch.full((4, 1), before)
    step = GateKL(0.25, 2.0)
    step.logits = [made.gate_logit]
    step.on_pre_optimizer_step(None, None, None)
    expected = (before or 0) + 2 * gate_kl_gradient(made.gate_logit, 0.25)
    torch.testing.assert_close(made.gate_logit.grad, expected)


def test_draws_keep_whole_ranks_and_their_mean_is_the_mean_adapter(case):
    posterior, count = case.fit(DALorRA(gate_lr=0.1)), 1500
    means = posterior.slots.weights()
    draws = [posterior.draw(i) for i in range(count)]
    gates = []
    for name in list(posterior.factors)[:2]:
        p = posterior.factors[name]
        drawn = torch.stack([draw[name] for draw in draws])
        kept = drawn / means[name] * p
        assert torch.allclose(kept, kept[..., :1].round().expand_as(kept), atol=1e-4)
        error = (means[name] / p).abs() * (p * (1 - p) / count).sqrt()
        assert ((drawn.mean(0) - means[name]).abs() < 4.5 * error).all()
        gates.append(kept[..., 0])
    correlation = torch.corrcoef(torch.cat(gates, 1).T) - torch.eye(16)
    assert correlation.abs().max() < 4.5 / math.sqrt(count)


@pytest.mark.parametrize("gate_lr", [0.0, 0.1])
def test_the_gates_have_a_learning_rate_of_their_own_and_the_kl_pulls_them(case, gate_lr):
    method = DALorRA(gate_lr=gate_lr, kl_weight=1e6, prior_kept=0.2)
    posterior = case.fit(method, learning_rate=0.0, warmup_ratio=0.0)
    kept = torch.cat(list(posterior.factors.values()))
    steps = sum((8 - t) / 8 for t in range(8))  # Adam's steps are its rate here
    expected = torch.tensor(-gate_lr * steps).sigmoid()
    torch.testing.assert_close(kept, expected.expand_as(kept), rtol=2e-2, atol=0)


def test_the_log_holds_the_kl_and_the_mean_of_the_gates(case):
    first = case.fit(DALorRA()).report.history[0]
    assert first["mean_kept"] == pytest.approx(0.5, abs=0.02)
    assert first["kl"] == pytest.approx(0, abs=0.1)


OUT_OF_RANGE = [
    {"prior_kept": 1.0},
    {"init_kept": 0.0},
    {"temperature": 0.0},
    {"gate_lr": -1.0},
    {"kl_weight": -1.0},
]


@pytest.mark.parametrize("change", OUT_OF_RANGE)
def test_values_out_of_range_are_refused(change):
    message = r"out of range: got DALorRA.*expected prior_kept and init_kept in \(0, 1\)"
    with pytest.raises(ValueError, match=message):
        DALorRA(**change)
