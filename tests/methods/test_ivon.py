import math

import pytest
import torch

from bayestune.adapters import SIDES
from bayestune.methods import IVON
from bayestune.methods.ivon import IVONOptimizer

FELT = IVON(learning_rate=10.0)  # a tiny model and a few steps need more than the published 0.03


def parameter(values):
    return torch.nn.Parameter(torch.as_tensor(values, dtype=torch.float64))


def optimizer(p, seed=0, **settings):
    values = {"learning_rate": 0.1, "ess": 1.0, "hess_init": 1.0, "delta": 0.0}
    values |= {"clip_radius": math.inf, **settings}
    return IVONOptimizer([p], IVON(**values), seed)


def quadratic(p, hessian, target):
    return 0.5 * (hessian * (p - target).square()).sum()


def test_the_first_step_is_the_formulas():
    m, ess, h, delta, lr, beta1, beta2 = 0.7, 50.0, 0.4, 0.1, 0.3, 0.8, 0.9
    p = parameter([m])
    made = optimizer(
        p, learning_rate=lr, ess=ess, hess_init=h, delta=delta, beta1=beta1, beta2=beta2
    )
    made.draw()
    sigma = 1 / math.sqrt(ess * (h + delta))
    noise = (p.item() - m) / sigma
    quadratic(p, 2.0, -1.0).backward()
    g = 2.0 * (m + sigma * noise + 1.0)
    made.step()
    h_hat = g * noise / sigma
    new_h = beta2 * h + (1 - beta2) * h_hat
    new_h += 0.5 * (1 - beta2) ** 2 * (h - h_hat) ** 2 / (h + delta)
    assert made.state[p]["hessian"].item() == pytest.approx(new_h, rel=1e-12)
    assert made.state[p]["momentum"].item() == pytest.approx((1 - beta1) * g, rel=1e-12)
    assert p.item() == pytest.approx(m - lr * (g + delta * m) / (new_h + delta), rel=1e-12)
    std = 1 / math.sqrt(ess * (new_h + delta))
    assert made.stds()[p].item() == pytest.approx(std, rel=1e-12)


def test_the_momentum_is_debiased_and_each_entry_is_clipped():
    p = parameter([0.0, 0.0])
    made = optimizer(p, learning_rate=0.5, ess=1e12, beta1=0.8, beta2=1 - 1e-12, clip_radius=3.0)
    second = [(0.8 * 0.2 * 1.0 + 0.2 * 2.0) / (1 - 0.8**2), (0.8 * 0.2 * -5.0) / (1 - 0.8**2)]
    expected = torch.zeros(2, dtype=torch.float64)
    for gradients, steps in (([1.0, -5.0], [1.0, -3.0]), ([2.0, 0.0], second)):
        made.draw()
        p.grad = torch.tensor(gradients, dtype=torch.float64)
        made.step()
        expected -= 0.5 * torch.tensor(steps, dtype=torch.float64)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-4, atol=0)


def test_on_a_quadratic_it_ends_at_the_ridge_solution_with_the_hessians_variance():
    hessian = torch.tensor([[0.2], [1.0], [3.0]], dtype=torch.float64)
    ess, delta, target, copies = 10.0, 0.5, 1.5, 600
    p = parameter(torch.zeros(3, copies))
    made = optimizer(p, learning_rate=0.02, ess=ess, delta=delta, beta2=0.995)
    means, precisions = [], []
    for step in range(2500):
        made.draw()
        made.zero_grad()
        quadratic(p, hessian, target).backward()
        made.step()
        if step >= 1500 and step % 50 == 0:
            means.append(p.detach().mean(1))
            precisions.append(made.stds()[p].pow(-2).mean(1))
    ridge = (hessian * target / (hessian + delta))[:, 0]
    error = p.detach().std(1) / math.sqrt(copies)  # of one snapshot: more than their average's
    assert ((torch.stack(means).mean(0) - ridge).abs() < 4 * error).all()
    assert (error < 0.02).all()
    precision = torch.stack(precisions).mean(0)
    torch.testing.assert_close(precision, ess * (hessian[:, 0] + delta), rtol=0.02, atol=0)


def test_draws_have_the_stated_moments_and_one_address():
    def drawn(seed, steps):
        p = torch.nn.Parameter(torch.full((200, 200), 0.3))
        made = optimizer(p, seed, ess=25.0, hess_init=0.75, delta=0.25)
        made.param_groups[0]["steps"] = steps
        torch.manual_seed(steps)
        made.draw()
        return p.detach()

    first = drawn(1, 0)
    assert abs(first.mean() - 0.3) < 4 * 0.2 / 200
    assert abs(first.std() / 0.2 - 1) < 4 / math.sqrt(2 * 40000)
    assert torch.equal(first, drawn(1, 0))
    assert not torch.equal(first, drawn(1, 1))
    assert not torch.equal(first, drawn(2, 0))


def test_a_second_draw_starts_from_the_mean_and_the_mean_stands_between_steps():
    p = parameter([1.0] * 5)
    made = optimizer(p)
    made.draw()
    first = p.detach().clone()
    made.draw()
    assert torch.equal(first, p.detach())
    made.step()
    assert torch.equal(p.detach(), torch.ones(5, dtype=torch.float64))


def test_a_step_without_a_draw_is_refused():
    message = r"got no noise, expected draw\(\) before the forward pass"
    with pytest.raises(RuntimeError, match=message):
        optimizer(parameter([1.0])).step()


OUT_OF_RANGE = [
    {"learning_rate": 0},
    {"ess": -1},
    {"clip_radius": 0},
    {"delta": -1},
    {"beta1": 1},
    {"hess_init": 0, "delta": 0},
]


@pytest.mark.parametrize("change", OUT_OF_RANGE)
def test_values_out_of_range_are_refused(change):
    message = "out of range: got IVON.*expected learning_rate, ess, clip_radius > 0"
    with pytest.raises(ValueError, match=message):
        IVON(**change)


def test_the_posteriors_spread_is_the_optimisers(case):
    posterior = case.fit(IVON(beta2=1 - 1e-9, hess_init=0.8, delta=0.2, ess=None))
    assert set(posterior.draw(0)) == set(posterior.slots.names(SIDES))
    name, mean = next(iter(posterior.slots.weights().items()))
    spread = torch.stack([posterior.draw(i)[name] - mean for i in range(50)])
    expected = 1 / math.sqrt(12)  # ess is the number of training rows
    assert abs(spread.std() / expected - 1) < 4 / math.sqrt(2 * spread.numel())


def test_a_fit_does_not_say_that_its_standard_deviation_starts_anew(case, caplog):
    case.fit(FELT)
    assert "starts anew" not in caplog.text


def test_the_head_is_trained_and_has_no_noise(head):
    posterior = head.fit(FELT)
    ((name, trained),) = posterior.slots.heads.items()
    assert not torch.equal(trained.weight, head.make().get_submodule(name).weight)
    assert not any(name.startswith(f"{drawn}.") for drawn in posterior.draw(0))


def test_accumulation_shares_the_draw_and_gives_the_same_step(case):
    whole = case.fit(FELT, steps=3).slots.weights()
    parts = case.fit(FELT, steps=3, batch_size=1, accumulation=4).slots.weights()
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=2e-4, rtol=1e-3)
