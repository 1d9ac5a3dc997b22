"""The families' laws: their draws' moments, what a draw is made of, and what they refuse."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from bayestune.adapters import GaussianLinear, Slots, bayesify, evaluating, held_noise
from bayestune.curvature import Diagonal
from bayestune.forward import Draws, seeded
from bayestune.posteriors import (
    KINDS,
    AdapterPosterior,
    Dropout,
    Gaussian,
    Linearised,
    LowRank,
    Mixture,
    Point,
    Sampled,
    Saved,
    Scaled,
    Tempered,
    TokenNoise,
    gaussian_logits,
    load_posterior,
    predict,
    save_posterior,
)
from tiny import BATCH, adapted, converted, end_logits, tiny_llama, with_second

COUNT = 2000


@pytest.fixture
def model() -> nn.Module:
    return adapted(tiny_llama(), r=4)


def slot_of(model: nn.Module, side: str = "A") -> tuple[str, torch.Tensor]:
    """The first slot of a side, and its weight."""
    name = next(name for name in Slots(model).modules() if name.endswith(side))
    return name, Slots(model).weights()[name].double()


def draws_of(posterior: AdapterPosterior, *names: str) -> torch.Tensor:
    """Draws of some slots, flat and side by side, (COUNT, entries)."""
    drawn = [posterior.draw(index) for index in range(COUNT)]
    flat = [torch.cat([draw[name].flatten() for name in names]) for draw in drawn]
    return torch.stack(flat).double()


def assert_moments(draws: torch.Tensor, mean: torch.Tensor, covariance: torch.Tensor) -> None:
    """Mean and covariance of Gaussian draws (COUNT, entries) within standard errors."""
    variance = covariance.diag()
    assert ((draws.mean(0) - mean) / (variance / COUNT).sqrt()).abs().max() < 4.5
    error = ((variance[:, None] * variance + covariance.square()) / COUNT).sqrt()
    assert ((draws.T.cov() - covariance) / error).abs().max() < 4.5


# Moments


def test_gaussian_entries_are_independent_of_mean_m_and_standard_deviation_omega():
    posterior = Gaussian(converted(tiny_llama(), r=2), end_logits)
    name, layer = next(iter(posterior.layers().items()))
    variance = layer.std.detach().double().square().flatten()
    mean = layer.weight.detach().double().flatten()
    assert_moments(draws_of(posterior, name)[:, :40], mean[:40], variance[:40].diag())


def test_normal_factors_shift_whole_rows_along_their_direction(model):
    name, mean = slot_of(model)
    std = torch.tensor([[0.1], [0.2], [0.3], [0.4]])
    direction = torch.randn(mean.shape)
    posterior = Scaled(model, end_logits, {name: std}, "normal", {name: direction})
    shift = (std * direction).double()
    covariance = torch.block_diag(*[row.outer(row) for row in shift])
    assert_moments(draws_of(posterior, name), mean.flatten(), covariance)
    unscaled = Scaled(model, end_logits, {name: std}, "normal")  # M itself is the direction
    noise = (unscaled.draw(0)[name] - mean) / mean
    assert_close(noise, noise[:, :1].expand_as(noise), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("axis", [0, 1])
def test_bernoulli_factors_keep_ranks_or_columns_as_often_as_they_say(model, axis):
    name, mean = slot_of(model)
    kept = torch.tensor([0.2, 0.5, 0.8, 1.0]).repeat(mean.shape[axis] // 4)
    factors = kept[:, None] if axis == 0 else kept[None]
    draws = draws_of(Scaled(model, end_logits, {name: factors}), name)
    ratio = draws.unflatten(1, mean.shape) / mean  # 0, or 1 over the probability
    rows = ratio if axis == 0 else ratio.mT
    assert_close(rows, rows[..., :1].expand_as(rows), rtol=1e-4, atol=1e-4)
    rows = rows[..., 0]
    on = rows > 0
    assert_close(rows, on / kept.double(), rtol=1e-4, atol=1e-4)
    error = (kept * (1 - kept) / COUNT).sqrt().clamp_min(1e-9)
    assert ((on.double().mean(0) - kept) / error).abs().max() < 4.5
    assert (on.double()[:, :3].T.corrcoef() - torch.eye(3)).abs().max() < 4.5 / math.sqrt(COUNT)


def test_low_rank_draws_have_the_stated_covariance_across_slots(model):
    torch.manual_seed(2)
    names = [slot_of(model)[0], slot_of(model, "B")[0]]
    shapes = Slots(model).shapes()
    variances = {name: torch.rand(shapes[name]) / 50 for name in names}
    deviations = {name: torch.randn(3, *shapes[name]) / 10 for name in names}
    draws = draws_of(LowRank(model, end_logits, variances, deviations), *names)
    mean = torch.cat([Slots(model).weights()[name].flatten() for name in names]).double()
    own = torch.cat([variances[name].flatten() for name in names]).double() / 2
    d = torch.cat([deviations[name].flatten(1) for name in names], 1).double()
    covariance = own.diag() + d.T @ d / (2 * (3 - 1))
    some = torch.arange(0, len(mean), 20)  # of both slots
    assert_moments(draws[:, some], mean[some], covariance[some][:, some])


def test_sampled_draws_are_held_noise_times_the_root_of_the_covariance(model):
    name, mean = slot_of(model, "B")
    curvature = torch.rand(mean.shape) + 0.1
    posterior = Sampled(model, end_logits, {name: Diagonal(curvature)}, prior_precision=5.0)
    noise = held_noise(mean.shape, 2, 7, name)
    drawn = posterior.draw(7, seed=2)[name]
    assert_close(drawn, mean.float() + noise / (curvature + 5).sqrt())


def test_gaussian_logits_have_the_stated_moments_in_every_row():
    torch.manual_seed(0)
    mean = torch.randn(2, 3)
    root = torch.randn(2, 3, 3)
    draws = gaussian_logits(mean, root @ root.mT, Draws(COUNT)).double()
    for row in range(2):
        covariance = (root[row] @ root[row].T).double()
        assert_moments(draws[:, row], mean[row].double(), covariance)


# Draws that are passes


def test_token_noise_is_the_layers_noise_with_signs_for_each_token():
    model = converted(tiny_llama())
    layers = list(Slots(model).of_kind(GaussianLinear).values())
    posterior = TokenNoise(model, end_logits)
    found = posterior.logits(BATCH, Draws(2, seed=3))
    assert {layer.noise for layer in layers} == {"row"}
    for layer in layers:
        layer.noise = "token"
    for index in (0, 1):
        with evaluating(model), seeded(model, 3, index):
            for layer in layers:
                layer.train()
            assert torch.equal(end_logits(model, BATCH), found[index])


def faint_token_noise(base: nn.Module) -> TokenNoise:
    return TokenNoise(converted(base, root_std=1e-6, lora_dropout=0.5), end_logits)


def faint_dropout(base: nn.Module) -> Dropout:
    return Dropout(adapted(base, lora_dropout=1e-9), end_logits)


@pytest.mark.parametrize("make", [faint_token_noise, faint_dropout])
def test_no_other_noise_is_switched_on_than_the_familys_own(make):
    posterior = make(tiny_llama(attention_dropout=0.5))
    mean = posterior.logits(BATCH, Draws(0)).expand(2, -1, -1)
    assert_close(posterior.logits(BATCH, Draws(2)), mean)


def test_dropout_draws_are_passes_with_loras_dropout_and_the_mean_has_none():
    model = adapted(tiny_llama(), lora_dropout=0.5)
    mean = end_logits(model, BATCH)
    posterior = Dropout(model, end_logits)
    found = posterior.logits(BATCH, Draws(2, seed=3, max_rows=1))
    assert torch.equal(posterior.logits(BATCH, Draws(0))[0], mean)
    for index in (0, 1):
        with seeded(model, 3, index):
            assert torch.equal(end_logits(model.train(), BATCH), found[index])


# Posteriors of posteriors


def one_pass(model: nn.Module) -> Mixture:
    bayesify(model, init_root_std=0.5)
    return Mixture([Gaussian(model, end_logits), Point(model, end_logits, adapter="b")])


def member_by_member(model: nn.Module) -> Mixture:
    return Mixture([Dropout(model, end_logits), Point(model, end_logits, adapter="b")])


@pytest.fixture
def two() -> nn.Module:
    """A model with the adapters "default" and "b"."""
    return with_second(adapted(tiny_llama(), lora_dropout=0.2))


@pytest.mark.parametrize("make", [one_pass, member_by_member])
def test_a_mixtures_draws_are_its_members_in_turn(make: Callable[..., Mixture], two):
    mixture = make(two)
    draws = {"seed": 2, "max_rows": 1}
    first, second = [member.logits(BATCH, Draws(3, **draws)) for member in mixture.members]
    expected = torch.stack([first, second], 1).flatten(0, 1)
    assert_close(mixture.logits(BATCH, Draws(6, **draws)), expected, atol=1e-5, rtol=1e-5)
    later = mixture.logits(BATCH, Draws(2, first=3, **draws))
    assert_close(later, expected[3:5], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(first, second, atol=1e-2)
    assert mixture.atoms is None


def test_a_mixture_of_points_is_exact_with_a_draw_of_each(two):
    points = [Point(two, end_logits), Point(two, end_logits, adapter="b")]
    assert Mixture(points).atoms == Mixture(points).passes(2) == 2
    alone = Mixture(points[1:])
    assert alone.has_mean
    assert torch.equal(alone.logits(BATCH, Draws(0)), points[1].logits(BATCH, Draws(0)))


def test_a_mixture_of_posteriors_with_a_fixed_number_of_draws_takes_those_of_all(two):
    blocks = {name: Diagonal(torch.full(x, 20.0)) for name, x in Slots(two).shapes().items()}
    members = [Linearised(two, end_logits, blocks, 5.0, adapter=name) for name in ("default", "b")]
    each = [predict(member, BATCH).probabilities for member in members]
    assert_close(predict(Mixture(members[:1]), BATCH).probabilities, each[0])
    assert_close(predict(Mixture(members), BATCH).probabilities, (each[0] + each[1]) / 2)
    assert Mixture([members[0], Point(two, end_logits, adapter="b")]).atoms is None
    assert (
        Tempered(Mixture(members), 2.0).passes(2000) == 2
    )  # one of each, whose draws cost nothing


@pytest.mark.parametrize("temperatures", [(2.0,), (2.0, 3.0)])
def test_a_mixture_under_temperatures_is_saved_with_all_members(two, tmp_path, temperatures):
    tempered = Mixture([Point(two, end_logits, adapter=name) for name in ("default", "b")])
    for temperature in temperatures:
        tempered = Tempered(tempered, temperature)
    loaded = load_posterior(tiny_llama(), save_posterior(tempered, tmp_path), end_logits)
    assert_close(loaded.logits(BATCH, Draws(2)), tempered.logits(BATCH, Draws(2)))


def test_a_mixture_shares_a_prefix_with_no_member(two):
    with pytest.raises(ValueError, match="got a Mixture without a mean adapter to read it with"):
        one_pass(two).logits(BATCH, Draws(2, shared_prefix=2))


def test_tempered_logits_are_divided_by_the_temperature(two):
    posterior = one_pass(two)
    found = Tempered(posterior, 2.5).logits(BATCH, Draws(3))
    assert_close(found, posterior.logits(BATCH, Draws(3)) / 2.5)
    assert Tempered(Point(two, end_logits), 2.5).atoms == 1


# Refusals


def test_mixtures_that_make_no_sense_are_refused(two):
    point = Point(two, end_logits)
    match = r"each with its own adapter: got the adapters \['default', 'default'\] on 1 models"
    with pytest.raises(ValueError, match=match):
        Mixture([point, point])
    with pytest.raises(ValueError, match=r"got the adapters \[\] on 0 models"):
        Mixture([])
    other = Point(copy.deepcopy(two), end_logits, adapter="b")
    with pytest.raises(ValueError, match=r"got the adapters \['default', 'b'\] on 2 models"):
        Mixture([point, other])
    with pytest.raises(ValueError, match="Tempered draws are not adapters: got a mixture of them"):
        Mixture([Tempered(point, 2.0)]).draw(0)
    with pytest.raises(NotImplementedError, match="loaded member by member: use load_posterior"):
        Mixture.restore(Saved(two, end_logits, {}, {}))


@pytest.mark.parametrize("family", [Gaussian, TokenNoise])
def test_a_model_without_a_gaussian_layer_is_refused(family, model):
    with pytest.raises(ValueError, match="has no Gaussian layer: got a deterministic model"):
        family(model, end_logits)


def test_an_adapter_without_dropout_is_refused(model):
    with pytest.raises(ValueError, match="the adapter has no dropout: got lora_dropout=0, expect"):
        Dropout(model, end_logits)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature, model):
    with pytest.raises(ValueError, match="the temperature must be positive: got"):
        Tempered(Point(model, end_logits), temperature)


def scaled(model: nn.Module) -> Scaled:
    name, mean = slot_of(model)
    return Scaled(model, end_logits, {name: torch.full((1, mean.shape[1]), 0.7)})


def low_rank(model: nn.Module) -> LowRank:
    name, mean = slot_of(model)
    variances = {name: torch.rand(mean.shape)}
    return LowRank(model, end_logits, variances, {name: torch.randn(2, *mean.shape)})


def gaussian(model: nn.Module) -> Gaussian:
    twin = copy.deepcopy(model)
    bayesify(twin)
    return Gaussian(twin, end_logits)


@pytest.mark.parametrize("make", [scaled, low_rank, gaussian])
def test_tensors_of_another_rank_or_model_are_refused(make, model):
    posterior = make(model)
    tensors, facts = posterior.state()
    cut = {name: value[..., :5] for name, value in tensors.items()}
    elsewhere = {f"no.{name}": value for name, value in tensors.items()}
    for wrong in (cut, elsewhere):
        with pytest.raises(ValueError, match="of another model or rank: got"):
            KINDS[posterior.kind].restore(Saved(model, end_logits, wrong, facts))
