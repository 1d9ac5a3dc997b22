import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from bayestune.adapters import SIDES, Lora, adapter_weights, head_modules, slot_names, slots
from bayestune.methods import SWAG
from bayestune.methods.swag import FILE, Collector
from bayestune.posteriors import LowRank
from bayestune.training import start_adapter, train
from promises import TRAINING, bound, keeps_its_promises, learns, resumes

OFTEN = SWAG(start=0.25, every=1, rank=3)


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
    torch.testing.assert_close(
        variance, exact.square().mean(0) - exact.mean(0).square(), rtol=1e-2, atol=0
    )
    running = torch.stack([exact[: i + 1].mean(0) for i in range(7)])
    torch.testing.assert_close(
        torch.stack(collector.deviations["weight"]).double(),
        (exact - running)[4:],
        rtol=0,
        atol=2e-6,
    )


def test_draws_have_the_mean_and_the_covariance_of_the_formula(llama):
    model = start_adapter(llama(), replace(TRAINING, lora=Lora(rank=1, targets=("q_proj",))))
    torch.manual_seed(1)
    shapes = {name: slot.weight.shape for name, slot in slots(model).items()}
    variances = {name: torch.rand(shape) for name, shape in shapes.items()}
    deviations = {name: torch.randn(4, *shape) for name, shape in shapes.items()}
    posterior, count = LowRank(model, None, variances, deviations), 3000
    draws = torch.stack(
        [torch.cat([d.flatten() for d in posterior.draw(i).values()]) for i in range(count)]
    ).double()
    mean = torch.cat([adapter_weights(model)[name].flatten() for name in shapes])
    columns = torch.cat([deviations[name].flatten(1) for name in shapes], 1).double()
    diagonal = torch.cat([variances[name].flatten() for name in shapes]).double()
    covariance = torch.diag(diagonal / 2) + columns.T @ columns / (2 * (4 - 1))
    scores = (draws.mean(0) - mean) / (covariance.diagonal() / count).sqrt()
    assert scores.abs().max() < 4.5
    spread = (covariance.diagonal()[:, None] * covariance.diagonal() + covariance.square()) / count
    scores = (draws.T.cov() - covariance) / spread.sqrt()
    assert scores.abs().max() < 5.5
    assert scores.mean().abs() < 0.5


@pytest.mark.parametrize("scoring", ["letter", "text", "head"])
def test_fit(scoring, llama, bert, byte_level, tiny_task, labelled_task, tmp_path):
    make, task = (bert, labelled_task) if scoring == "head" else (llama, tiny_task)
    scorer, batch = bound(make, byte_level, task, scoring)
    posterior = keeps_its_promises(OFTEN, make, scorer, batch, tmp_path)
    assert isinstance(posterior, LowRank)
    assert set(posterior.draw(0)) == set(slot_names(posterior.model, SIDES))
    assert learns(SWAG(rate=1.0), make, scorer, task) < 0.85


def test_the_fit_is_the_mean_and_the_spread_of_maximum_likelihoods_iterates(
    bert, byte_level, labelled_task
):
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def __init__(self):
            self.path, self.rates = [], []

        def on_step_begin(self, args, state, control, **kwargs):
            self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])

        def on_step_end(self, args, state, control, model=None, **kwargs):
            slot = slots(model)[name].weight.detach().clone()
            self.path.append(
                (slot, next(iter(head_modules(model).values())).weight.detach().clone())
            )

    scorer, _ = bound(bert, byte_level, labelled_task, "head")
    training, method, watch = (
        replace(TRAINING, steps=10),
        SWAG(start=0.3, rate=0.5, rank=2, every=2),
        Watch(),
    )
    posterior = method.fit(bert(), scorer, training)
    name = next(iter(posterior.variances))
    train(
        start_adapter(bert(), training), scorer, training, [method._collector(training, 12), watch]
    )
    assert watch.rates[3:] == pytest.approx([0.5 * training.learning_rate] * 7)
    assert watch.rates[1] == pytest.approx(0.9 * training.learning_rate)
    path, heads = (torch.stack([watch.path[i][part] for i in (4, 6, 8)]) for part in (0, 1))
    assert posterior.fitted["iterates"] == 3
    torch.testing.assert_close(
        adapter_weights(posterior.model)[name], path.mean(0), rtol=1e-5, atol=1e-7
    )
    torch.testing.assert_close(
        next(iter(head_modules(posterior.model).values())).weight, heads.mean(0)
    )
    torch.testing.assert_close(
        posterior.variances[name], path.var(0, correction=0), rtol=1e-2, atol=1e-10
    )
    deviations = torch.stack([path[1] - path[:2].mean(0), path[2] - path.mean(0)])
    torch.testing.assert_close(posterior.deviations[name], deviations, rtol=1e-3, atol=1e-7)


def test_a_resumed_run_ends_bit_by_bit_as_the_whole_one(llama, byte_level, tiny_task, tmp_path):
    scorer, batch = bound(llama, byte_level, tiny_task, "letter")
    assert resumes(SWAG(start=0.25, every=1, rank=2), llama, scorer, batch, tmp_path)


def test_a_checkpoint_without_the_iterates_is_refused(llama, byte_level, tiny_task, tmp_path):
    scorer, _ = bound(llama, byte_level, tiny_task, "letter")
    training = replace(TRAINING, save_steps=4, output=tmp_path)
    OFTEN.fit(llama(), scorer, training)
    (tmp_path / "checkpoint-8" / FILE).unlink()
    with pytest.raises(
        ValueError, match="SWAG cannot go on from this checkpoint: got no .*swag.safetensors"
    ):
        OFTEN.fit(llama(), scorer, replace(training, steps=12, resume=True))


def test_by_default_an_iterate_an_epoch_or_more_often_in_a_short_run():
    long = SWAG()._collector(replace(TRAINING, steps=3000, batch_size=4), 80)
    assert (long.start, long.every, long.rank) == (1600, 20, 5)
    short = SWAG()._collector(replace(TRAINING, steps=75, batch_size=4, accumulation=2), 8000)
    assert (short.start, short.every) == (40, 3)
    assert math.isclose(short.rate, 0.1)


def test_fewer_than_two_iterates_are_refused_before_training(llama, byte_level, tiny_task):
    scorer, _ = bound(llama, byte_level, tiny_task, "letter")
    with pytest.raises(
        ValueError,
        match="SWAG needs two iterates: got 1 in 4 steps, one in every 3, expected at least",
    ):
        SWAG(start=0.5, every=3).fit(llama(), scorer, TRAINING)


@pytest.mark.parametrize(
    "change", [{"start": 1.0}, {"start": -0.1}, {"rate": 0.0}, {"rank": 1}, {"every": 0}]
)
def test_values_out_of_range_are_refused(change):
    with pytest.raises(ValueError, match=r"out of range: got SWAG.*expected start in \[0, 1\)"):
        SWAG(**change)
