import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli
from torch.distributions import kl_divergence as reference

from bayestune.adapters import adapter_weights
from bayestune.methods import DALorRA
from bayestune.methods.dalorra import GatedLinear, _AddKL, kl_divergence, kl_gradient
from bayestune.posteriors import Scaled
from promises import TRAINING, bound, keeps_its_promises, learns, resumes

FELT = DALorRA(gate_lr=0.1)


def layer(kept=0.5, temperature=0.5, rank=4):
    torch.manual_seed(0)
    return GatedLinear(nn.Linear(16, rank, bias=False), kept, temperature)


def test_the_kl_is_torchs_and_the_closed_gradient_is_autograds():
    torch.manual_seed(0)
    logit = (3 * torch.randn(6, dtype=torch.float64)).requires_grad_()
    kl = kl_divergence(logit, 0.2)
    torch.testing.assert_close(
        kl,
        reference(Bernoulli(logits=logit), Bernoulli(torch.tensor(0.2, dtype=torch.float64))).sum(),
        rtol=1e-9,
        atol=0,
    )
    kl.backward()
    torch.testing.assert_close(kl_gradient(logit, 0.2), logit.grad, rtol=1e-9, atol=1e-12)
    assert kl_divergence(torch.zeros(3), 0.5).item() == pytest.approx(0, abs=1e-7)
    assert kl_divergence(torch.tensor([40.0, -40.0]), 0.5).isfinite()


@pytest.mark.parametrize("temperature", [0.05, 0.5, 2.0])
def test_a_relaxed_gate_is_open_with_its_probability(temperature):
    made, count = layer(0.8, temperature), 20000
    gates = made.factors(count).detach()
    error = math.sqrt(0.8 * 0.2 / count)
    assert ((gates > 0.5).float().mean(0) - 0.8).abs().max() < 4.5 * error
    assert (torch.corrcoef(gates.T) - torch.eye(4)).abs().max() < 4.5 / math.sqrt(count)
    if temperature == 0.05:
        assert (gates.mean(0) - 0.8).abs().max() < 4.5 * error + 0.005
    # sharper gates are nearer to 0 and 1: the mean of z(1 − z) grows with the temperature
    assert gates.mul(1 - gates).mean() < {0.05: 0.01, 0.5: 0.09, 2.0: 0.25}[temperature]
    assert gates.mul(1 - gates).mean() > {0.05: 0.0, 0.5: 0.05, 2.0: 0.15}[temperature]


def test_the_relaxations_gradient_is_that_of_its_noise_held_fixed():
    made = layer(0.6, 0.7).double()

    logit = made.gate_logit.detach().clone().requires_grad_()
    del made.gate_logit
    made.__dict__["gate_logit"] = logit

    def factors(value):
        torch.manual_seed(3)
        made.__dict__["gate_logit"] = value
        return made.factors(5)

    assert torch.autograd.gradcheck(factors, (logit,))
    gates = factors(logit)
    (gradient,) = torch.autograd.grad(gates.sum(), logit)
    torch.testing.assert_close(gradient, (gates * (1 - gates)).sum(0)[:, None] / 0.7)


def test_training_gates_the_ranks_row_by_row_and_evaluation_is_the_mean():
    made, inputs = layer(0.7), torch.randn(3, 5, 16)
    plain = nn.functional.linear(inputs, made.weight)
    torch.manual_seed(1)
    gates = made.factors(3)
    torch.manual_seed(1)
    torch.testing.assert_close(made.train()(inputs), plain * gates[:, None])
    torch.testing.assert_close(made.eval()(inputs), plain * 0.7)


def test_the_kls_gradient_is_added_before_the_step():
    made = layer(0.9)
    step = _AddKL([made], 0.25, 2.0)
    step.on_pre_optimizer_step(None, None, None)
    torch.testing.assert_close(made.gate_logit.grad, 2 * kl_gradient(made.gate_logit, 0.25))
    made.gate_logit.grad = torch.ones(4, 1)
    step.on_pre_optimizer_step(None, None, None)
    torch.testing.assert_close(made.gate_logit.grad, 1 + 2 * kl_gradient(made.gate_logit, 0.25))


@pytest.mark.parametrize("scoring", ["letter", "text", "head"])
def test_fit(scoring, llama, bert, byte_level, tiny_task, labelled_task, tmp_path):
    make, task = (bert, labelled_task) if scoring == "head" else (llama, tiny_task)
    scorer, batch = bound(make, byte_level, task, scoring)
    posterior = keeps_its_promises(FELT, make, scorer, batch, tmp_path)
    assert isinstance(posterior, Scaled)
    assert learns(DALorRA(init_kept=0.9), make, scorer, task) < 0.85


def test_draws_keep_whole_ranks_and_their_mean_is_the_mean_adapter(llama, byte_level, tiny_task):
    scorer, _ = bound(llama, byte_level, tiny_task, "letter")
    posterior, count = FELT.fit(llama(), scorer, TRAINING), 1500
    means, names = adapter_weights(posterior.model), list(posterior.factors)[:2]
    draws = [posterior.draw(i) for i in range(count)]
    gates, probabilities = [], torch.cat([posterior.factors[name][:, 0] for name in names])
    for name in names:
        kept = torch.stack([draw[name] for draw in draws]) / means[name] * posterior.factors[name]
        assert torch.allclose(kept, kept[..., :1].round().expand_as(kept), atol=1e-4)
        gates.append(kept[..., 0])
        error = (means[name] / posterior.factors[name]).abs() * (
            posterior.factors[name] * (1 - posterior.factors[name]) / count
        ).sqrt()
        assert (
            (torch.stack([draw[name] for draw in draws]).mean(0) - means[name]).abs() < 4.5 * error
        ).all()
    gates = torch.cat(gates, 1)
    assert ((probabilities > 0.02) & (probabilities < 0.98)).all()
    assert (torch.corrcoef(gates.T) - torch.eye(len(probabilities))).abs().max() < 4.5 / math.sqrt(
        count
    )


def test_the_gates_have_a_learning_rate_of_their_own_and_the_kl_pulls_them(
    llama, byte_level, tiny_task
):
    scorer, _ = bound(llama, byte_level, tiny_task, "letter")
    still = replace(TRAINING, learning_rate=0.0, warmup_ratio=0.0)
    kept = [
        torch.cat(
            list(
                DALorRA(gate_lr=lr, kl_weight=1e6, prior_kept=0.2)
                .fit(llama(), scorer, still)
                .factors.values()
            )
        )
        for lr in (0.0, 0.1)
    ]
    assert (kept[0] == 0.5).all()
    expected = torch.tensor(
        -0.1 * sum((8 - t) / 8 for t in range(8))
    ).sigmoid()  # Adam's steps are its rate here
    torch.testing.assert_close(kept[1], expected.expand_as(kept[1]), rtol=2e-2, atol=0)
    history = DALorRA().fit(llama(), scorer, TRAINING).fitted["history"]
    assert history[0]["mean_kept"] == pytest.approx(0.5, abs=0.02)
    assert history[0]["kl"] == pytest.approx(0, abs=0.1)


def test_a_resumed_run_ends_bit_by_bit_as_the_whole_one(llama, byte_level, tiny_task, tmp_path):
    scorer, batch = bound(llama, byte_level, tiny_task, "letter")
    assert resumes(FELT, llama, scorer, batch, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"prior_kept": 1.0},
        {"init_kept": 0.0},
        {"temperature": 0.0},
        {"gate_lr": -1.0},
        {"kl_weight": -1.0},
    ],
)
def test_values_out_of_range_are_refused(change):
    with pytest.raises(
        ValueError,
        match=r"out of range: got DALorRA.*expected prior_kept and init_kept in \(0, 1\)",
    ):
        DALorRA(**change)
