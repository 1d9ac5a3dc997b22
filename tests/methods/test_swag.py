import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from bayestune.adapters import SIDES, Lora, Slots
from bayestune.methods import SWAG
from bayestune.methods.swag import FILE, Collector
from bayestune.posteriors import LowRank
from bayestune.training import fit_adapter, start_adapter
from promises import TRAINING


def test_the_moments_are_those_of_the_trajectory_and_the_deviations_its_last():
    torch.manual_seed(0)
    model, path = nn.Linear(4, 3), 5 + 1e-3 * torch.randn(7, 3, 4)
    model.bias.requires_grad_(False)
    collector = Collector(0, 1, rank=3, rate=1.0)
    for point in path:
        model.weight.data.copy_(point)
        collector.collect(model)
    assert set(collector.means) == {"weight"}
    exact = path.double()
    torch.testing.assert_close(collector.means["weight"].double(), exact.mean(0), rtol=1e-6, atol=0)
    variance = collector.squares["weight"].double() / collector.count
    torch.testing.assert_close(variance, exact.var(0, correction=0), rtol=1e-2, atol=0)
    running = exact.cumsum(0) / torch.arange(1, 8)[:, None, None]
    deviations = torch.stack(collector.deviations["weight"]).double()
    torch.testing.assert_close(deviations, (exact - running)[4:], rtol=0, atol=2e-6)


def flat(weights):
    return torch.cat([weight.flatten() for weight in weights.values()]).double()


def test_draws_have_the_mean_and_the_covariance_of_the_formula(case):
    model = start_adapter(case.make(), replace(TRAINING, lora=Lora(rank=1, targets=("q_proj",))))
    torch.manual_seed(1)
    means = Slots(model).weights()
    variances = {name: torch.rand_like(mean) for name, mean in means.items()}
    deviations = {name: torch.randn(4, *mean.shape) for name, mean in means.items()}
    posterior, count = LowRank(model, case.scorer, variances, deviations), 3000
    draws = torch.stack([flat(posterior.draw(i)) for i in range(count)])
    columns = torch.cat([value.flatten(1) for value in deviations.values()], 1).double()
    covariance = torch.diag(flat(variances) / 2) + columns.T @ columns / (2 * (4 - 1))
    scores = (draws.mean(0) - flat(means)) / (covariance.diagonal() / count).sqrt()
    assert scores.abs().max() < 4.5
    spread = (covariance.diagonal()[:, None] * covariance.diagonal() + covariance.square()) / count
    scores = (draws.T.cov() - covariance) / spread.sqrt()
    assert scores.abs().max() < 5.5
    assert scores.mean().abs() < 0.5


class Watch(TrainerCallback):
    """Follows the learning rate, the first slot and the head."""

    def __init__(self):
        self.rates, self.slots, self.heads = [], [], []

    def on_step_begin(self, args, state, control, **kwargs):
        self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])

    def on_step_end(self, args, state, control, model=None, **kwargs):
        slots = Slots(model)
        self.slots.append(next(iter(slots.weights().values())).clone())
        self.heads.append(next(iter(slots.heads.values())).weight.detach().clone())


def test_the_fit_is_the_mean_and_the_spread_of_maximum_likelihoods_iterates(head):
    training = replace(TRAINING, steps=10)
    method, watch = SWAG(start=0.3, rate=0.5, rank=2, every=2), Watch()
    posterior = head.fit(method, steps=10)
    callbacks = [method.collector(training, 12), watch]
    fit_adapter(head.make(), head.scorer, training, callbacks)
    assert watch.rates[3:] == pytest.approx([0.5 * training.learning_rate] * 7)
    assert watch.rates[1] == pytest.approx(0.9 * training.learning_rate)
    assert posterior.report.extra["iterates"] == 3
    path, heads = (
        torch.stack([values[i] for i in (4, 6, 8)]) for values in (watch.slots, watch.heads)
    )
    name, mean = next(iter(posterior.slots.weights().items()))
    torch.testing.assert_close(mean, path.mean(0), rtol=1e-5, atol=1e-7)
    (trained,) = posterior.slots.heads.values()
    torch.testing.assert_close(trained.weight, heads.mean(0))
    variance = path.var(0, correction=0)
    torch.testing.assert_close(posterior.variances[name], variance, rtol=1e-2, atol=1e-10)
    deviations = torch.stack([path[1] - path[:2].mean(0), path[2] - path.mean(0)])
    torch.testing.assert_close(posterior.deviations[name], deviations, rtol=1e-3, atol=1e-7)
    assert set(posterior.draw(0)) == set(posterior.slots.names(SIDES))


def test_a_checkpoint_without_the_iterates_is_refused(case, tmp_path):
    often = SWAG(start=0.25, every=1, rank=3)
    case.fit(often, save_steps=4, output=tmp_path)
    (tmp_path / "checkpoint-8" / FILE).unlink()  # as a kill leaves it: the one before is taken
    resumed = case.fit(often, save_steps=6, output=tmp_path, steps=12, resume=True)
    assert resumed.report.extra["iterates"] == 10  # two before, eight after
    for checkpoint in tmp_path.glob("checkpoint-*"):
        (checkpoint / FILE).unlink(missing_ok=True)
    message = "SWAG cannot go on from this checkpoint: got no .*swag.safetensors"
    with pytest.raises(ValueError, match=message):
        case.fit(often, save_steps=4, output=tmp_path, steps=12, resume=True)


def test_by_default_an_iterate_an_epoch_or_more_often_in_a_short_run():
    long = SWAG().collector(replace(TRAINING, steps=3000), 80)
    assert (long.start, long.every, long.rank) == (1600, 20, 5)
    short = SWAG().collector(replace(TRAINING, steps=75, accumulation=2), 8000)
    assert (short.start, short.every) == (40, 3)
    assert math.isclose(short.rate, 0.1)


def test_fewer_than_two_iterates_are_refused_before_training(case):
    message = "SWAG needs two iterates: got 1 in 4 steps, one in every 3, expected at least"
    with pytest.raises(ValueError, match=message):
        case.fit(SWAG(start=0.5, every=3))


OUT_OF_RANGE = [{"start": 1.0}, {"start": -0.1}, {"rate": 0.0}, {"rank": 1}, {"every": 0}]


@pytest.mark.parametrize("change", OUT_OF_RANGE)
def test_values_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match=r"got SWAG.*expected start in \[0, 1\)|every: got 0, exp"):
        SWAG(**change)
