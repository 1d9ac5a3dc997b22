import pytest
import torch

from bayestune.adapters import Slots
from bayestune.methods import MAP, MLE
from bayestune.methods.map import GaussianPrior
from promises import LONG


def test_map_shrinks_and_a_weak_prior_is_mle(case):
    def norm(method):
        weights = case.fit(method, **LONG).slots.weights()
        return sum(weight.square().sum() for weight in weights.values())

    mle = norm(MLE())
    assert norm(MAP(weight_decay=0.0)) == mle
    assert norm(MAP(weight_decay=1.0)) < 0.95 * mle
    assert norm(MAP(prior_std=0.02)) < 0.95 * mle
    torch.testing.assert_close(norm(MAP(prior_std=1e6)), mle)


def test_the_priors_gradient_is_theta_over_n_and_its_variance(case):
    model = case.fit(MLE()).model
    weights = [slot.get_parameter("weight") for slot in Slots(model).modules().values()]
    log_prior = sum(torch.distributions.Normal(0.0, 0.5).log_prob(w).sum() for w in weights)
    expected = torch.autograd.grad(-log_prior / 12, weights)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    prior = GaussianPrior(prior_std=0.5, num_rows=12)
    prior.on_train_begin(None, None, None, model=model)
    prior.on_pre_optimizer_step(None, None, None)
    for weight, value in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.grad, value)


def test_a_prior_without_a_scale_is_refused():
    message = "a prior has a positive scale: got weight_decay=1e-05, prior_std=0"
    with pytest.raises(ValueError, match=message):
        MAP(prior_std=0)
