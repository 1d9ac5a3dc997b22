"""Laplace's posteriors against dense algebra and the conjugate linear-Gaussian model."""

import math
from dataclasses import replace

import pytest
import torch

from bayestune.adapters import Slots
from bayestune.curvature import Curvature, Kronecker, factors, gauss_newton, log_evidence
from bayestune.forward import Draws
from bayestune.posteriors import Linearised, Point, Sampled, Saved, predict
from dense import adapted, adapted_linear, close, dense, inverse, jacobians, score
from promises import Case
from tiny import tiny_llama

LARGE = {"rank": 3}  # with FULL_UP_TO at 8, so that factors are of low rank


@pytest.fixture(scope="module")
def case():
    return Case("letter")


@pytest.fixture
def model():
    return adapted(tiny_llama(), ["q_proj", "v_proj", "down_proj"])


def blocks_of(model, case, **settings):
    batch = case.scorer.collate(case.scorer.encode(case.task.train))
    return gauss_newton(Slots(model), case.scorer, [batch], **settings).blocks


@pytest.fixture
def blocks(model, case, monkeypatch):
    monkeypatch.setattr(factors, "FULL_UP_TO", 8)
    return blocks_of(model, case, rank=5)


@pytest.fixture
def posterior(model, case, blocks):
    return Linearised(model, case.scorer, blocks, 0.05)


# The linear-Gaussian model: Laplace is the posterior

STD, PRECISION = 0.7, 3.0


class Conjugate:
    """y = W0·x + s·B·A·x + σ·noise in A alone: features Φ (N, C, P) and targets over W0·x."""

    def __init__(self):
        self.model = adapted_linear()
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(20, 6, generator=generator, dtype=torch.float64)
        self.y = torch.randn(20, 3, generator=generator, dtype=torch.float64)
        self.b = 2.0 * Slots(self.model).weights()["head.lora_B"]
        self.x, self.flat = x, self.features(x).flatten(0, 1)
        with torch.no_grad(), self.model.disable_adapter():
            self.rest = self.y - self.model(x)
        eye = torch.eye(12, dtype=torch.float64)
        self.precision = self.flat.mT @ self.flat / STD**2 + PRECISION * eye
        self.mean = torch.linalg.solve(self.precision, self.flat.mT @ self.rest.flatten() / STD**2)
        Slots(self.model).modules()["head.lora_A"].weight.data = self.mean.view(2, 6)
        out_values, out_vectors = torch.linalg.eigh(self.b.mT @ self.b / STD**2)
        in_values, in_vectors = torch.linalg.eigh(x.mT @ x)
        self.blocks = {"head.lora_A": Kronecker(in_vectors, in_values, out_vectors, out_values)}

    def features(self, x):
        return torch.einsum("cr,nk->ncrk", self.b, x).flatten(2)


def test_on_a_quadratic_it_is_the_true_posterior():
    truth = Conjugate()
    new = torch.randn(4, 6, dtype=torch.float64)
    features = truth.features(new)
    mean, covariance = Linearised(truth.model, score, truth.blocks, PRECISION).moments({"x": new})
    expected = features @ torch.linalg.inv(truth.precision) @ features.mT
    torch.testing.assert_close(covariance.double(), expected, atol=1e-5, rtol=1e-5)
    with truth.model.disable_adapter():
        expected = (truth.model(new) + features @ truth.mean).detach()
    torch.testing.assert_close(mean, expected, atol=1e-5, rtol=1e-5)


def test_on_a_quadratic_the_evidence_is_the_marginal_likelihood():
    truth = Conjugate()
    with torch.no_grad():
        normal = torch.distributions.Normal(truth.model(truth.x), STD)
    found = Curvature(truth.blocks, normal.log_prob(truth.y).sum().item())
    covariance = STD**2 * torch.eye(60, dtype=torch.float64)
    covariance += truth.flat @ truth.flat.mT / PRECISION
    marginal = torch.distributions.MultivariateNormal(torch.zeros(60).double(), covariance)
    expected = marginal.log_prob(truth.rest.flatten()).item()
    norm = truth.mean.square().sum().item()
    assert log_evidence(found, norm, PRECISION) == pytest.approx(expected, rel=1e-9)


# The linearised predictive


@pytest.mark.parametrize("options", [{}, {"layout": "packed"}, {"layout": "expanded"}])
@pytest.mark.parametrize("settings", [{}, LARGE, {"structure": "diagonal"}])
def test_the_covariance_is_the_dense_one(model, options, settings, monkeypatch):
    monkeypatch.setattr(factors, "FULL_UP_TO", 8 if settings is LARGE else 100)
    case = Case("text" if options else "letter", **options)
    blocks = blocks_of(model, case, **settings)
    batch = case.collate(case.task.evaluation[:3])[0]
    logits, jacobian = jacobians(model, case.scorer, batch)
    expected = 0.0
    for name, block in blocks.items():
        flat = jacobian[name].flatten(2).double()
        expected = expected + flat @ inverse(block, 0.1) @ flat.mT
    posterior = Linearised(model, case.scorer, blocks, 0.1)
    mean, covariance = posterior.moments(batch)
    torch.testing.assert_close(mean, logits)
    close(covariance, expected)
    surer, same = posterior.moments(batch, [5.0, 0.1])[1]
    close(same, expected)
    assert (surer.diagonal(dim1=-2, dim2=-1) <= covariance.diagonal(dim1=-2, dim2=-1)).all()
    for bounds in ({"max_rows": 1}, {"max_bytes": 1}):
        close(replace(posterior, **bounds).moments(batch)[1], expected)


def test_draws_have_the_moments(posterior, case):
    mean, covariance = posterior.moments(case.batch)
    draws, present = posterior.logits(case.batch, Draws(4000)), case.batch["option_mask"]
    assert torch.equal(draws.isfinite().all(0), present)
    var = covariance.diagonal(dim1=-2, dim2=-1)
    assert torch.equal(var > 0, present)
    error = (draws.mean(0) - mean)[present] / (var[present] / 4000).sqrt()
    assert error.abs().max() < 4.5
    centred = torch.where(present, draws - mean, 0.0)
    products = torch.einsum("snc,snd->ncd", centred, centred) / 4000
    spread = ((var[:, :, None] * var[:, None] + covariance.square()) / 4000).sqrt()
    assert ((products - covariance).abs() <= 4.5 * spread + 1e-12).all()
    assert posterior.atoms == 1000


def test_draws_do_not_depend_on_the_batch_or_their_number(posterior, case):
    whole = posterior.logits(case.batch, Draws(5, seed=2))
    torch.testing.assert_close(posterior.logits(case.batch, Draws(2, seed=2)), whole[:2])
    narrow = next(i for i, row in enumerate(case.task.evaluation) if len(row.options) == 3)
    batch = case.collate(case.task.evaluation[narrow : narrow + 1])[0]
    alone = posterior.logits(batch, Draws(5, seed=2))
    torch.testing.assert_close(alone[:, 0], whole[:, narrow, :3], atol=1e-4, rtol=1e-4)
    other = posterior.logits(case.batch, Draws(5, seed=3))
    assert not torch.allclose(other[..., :3], whole[..., :3])


def test_no_draws_is_the_mean_and_a_larger_prior_precision_is_surer(posterior, model, case):
    mean = Point(model, case.scorer).logits(case.batch, Draws(0))
    assert torch.equal(posterior.logits(case.batch, Draws(0)), mean)
    wide, middle, narrow = (
        predict(replace(posterior, prior_precision=value), case.batch, 50).mutual_information
        for value in (0.01, 1.0, 100.0)
    )
    assert (wide > middle).all()
    assert (middle > narrow).all()


def test_gradients_are_switched_on_inside_whatever_the_caller_has_set(posterior, model, case):
    expected = posterior.moments(case.batch)
    model.requires_grad_(False)
    with torch.no_grad():
        torch.testing.assert_close(posterior.moments(case.batch), expected)
    with torch.autocast("cpu", torch.bfloat16):
        covariance = posterior.moments(case.batch)[1]
    assert covariance.dtype == torch.float32
    assert (covariance - expected[1]).norm() < 0.05 * expected[1].norm()
    assert not any(value.requires_grad for value in expected)


# Draws of adapters


@pytest.mark.parametrize("settings", [LARGE, {"structure": "diagonal"}])
def test_sampled_draws_have_the_moments(model, case, settings, monkeypatch):
    monkeypatch.setattr(factors, "FULL_UP_TO", 8)
    name, precision = "model.layers.0.self_attn.v_proj.lora_B", 0.02
    block = blocks_of(model, case, **settings)[name]
    posterior = Sampled(model, case.scorer, {name: block}, precision)
    covariance = inverse(block, precision).float()
    draws = torch.stack([posterior.draw(i)[name] for i in range(3000)])
    errors = (draws - posterior.slots.weights()[name]).flatten(1)
    assert (errors.mean(0) / (covariance.diag() / 3000).sqrt()).abs().max() < 4.5
    along = torch.linalg.eigh(dense(block)).eigenvectors
    variances = (errors @ along).square().mean(0)
    expected = (along.mT @ covariance @ along).diag()
    assert (variances / expected - 1).abs().max() < 4.5 * math.sqrt(2 / 3000)


def test_small_sampled_posteriors_agree_with_the_linearised_one(model, case, blocks):
    _, covariance = Linearised(model, case.scorer, blocks, 1e5).moments(case.batch)
    sampled = Sampled(model, case.scorer, blocks, 1e5)
    draws = sampled.logits(case.batch, Draws(800))
    present = case.batch["option_mask"]
    ratio = draws.var(0)[present] / covariance.diagonal(dim1=-2, dim2=-1)[present]
    assert (ratio - 1).abs().max() < 4.5 * math.sqrt(2 / 800)
    weights = sampled.draw(0)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(weight, weights[n]) for n, weight in sampled.draw(0).items())


# Artefacts


@pytest.mark.parametrize("family", [Linearised, Sampled])
@pytest.mark.parametrize("structure", ["kfac", "diagonal"])
def test_state_and_restore(model, case, structure, family):
    blocks = blocks_of(model, case, structure=structure)
    posterior = family(model, case.scorer, blocks, 0.3, max_rows=2)
    tensors, facts = posterior.state()
    again = family.restore(Saved(model, case.scorer, tensors, facts, "default"))
    assert (again.prior_precision, again.max_rows, again.max_bytes) == (0.3, 2, 2**30)
    expected = posterior.logits(case.batch, Draws(3))
    torch.testing.assert_close(again.logits(case.batch, Draws(3)), expected)


def test_the_state_of_another_model_and_bad_numbers_are_refused(posterior, model, case):
    tensors, facts = posterior.state()
    other = adapted(tiny_llama(), ["q_proj", "v_proj", "down_proj"], rank=4)
    message = "curvature of another model or rank: got 12 blocks, 12 of them do not fit"
    with pytest.raises(ValueError, match=message):
        Linearised.restore(Saved(other, case.scorer, tensors, facts, "default"))
    with pytest.raises(ValueError, match="got 0 blocks"):
        Linearised.restore(Saved(other, case.scorer, {}, facts, "default"))
    with pytest.raises(ValueError, match="the prior's precision must be positive: got -1"):
        Linearised(model, case.scorer, {}, -1)
