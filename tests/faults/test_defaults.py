"""By default the mean is trained under the noise it is used with; earlier settings still hold."""

import math
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from bayestune import Refusal
from bayestune.adapters import GaussianLinear, bayesify
from bayestune.kl import KLStep, burst_period, kl_weights, warmup_decay
from bayestune.kl.plan import Aim
from bayestune.methods import BBB, METHODS, AuthorsBLoB, BLoB, make_method
from tiny import adapted, tiny_llama

CONFIGS = Path(__file__).parents[2] / "configs"
STEPS = 150
GIVEN = {"final_std": None, "kl_lr": None, "schedule": None}


# README's two lines


class Rows(torch.utils.data.Dataset):
    """Sequences that count in steps of 1, 2 or 3: something to learn."""

    def __init__(self) -> None:
        start = torch.randint(0, 90, (256, 1), generator=torch.Generator().manual_seed(0))
        self.ids = 3 + (start + (1 + start % 3) * torch.arange(8)) % 90

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


class Watch(TrainerCallback):
    def __init__(self, model: nn.Module) -> None:
        self.layers = [one for one in model.modules() if isinstance(one, GaussianLinear)]
        self.stds: list[float] = []
        self.norms: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        stds = [layer.std.mean().item() for layer in self.layers]
        self.stds.append(sum(stds) / len(stds))
        squares = sum(layer.weight.detach().square().sum().item() for layer in self.layers)
        self.norms.append(math.sqrt(squares))


def two_lines(step: KLStep, folder: Path) -> tuple[Watch, float]:
    torch.manual_seed(0)
    model = adapted(tiny_llama(num_hidden_layers=1))
    bayesify(model)
    watch = Watch(model)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=True,
        seed=3,
    )
    rows = Rows()
    Trainer(model, arguments, train_dataset=rows, callbacks=[step, watch]).train()
    with torch.no_grad():
        loss = model.eval()(input_ids=rows.ids, labels=rows.ids).loss
    return watch, float(loss)


def test_the_readmes_two_lines_train_the_mean_under_the_noise_it_is_used_with(tmp_path):
    watch, loss = two_lines(KLStep(prior_std=0.2, final_std=0.1), tmp_path)
    assert watch.stds[STEPS // 2] > 0.05
    assert watch.stds[-1] == pytest.approx(0.1, abs=0.005)
    tens = [late / early for early, late in zip(watch.norms, watch.norms[10:], strict=False)]
    assert min(tens) > 0.85
    _, of_bursts = two_lines(KLStep(prior_std=0.2, final_std=0.1, schedule="bursts"), tmp_path)
    assert loss < of_bursts


# What is left open


@pytest.mark.parametrize(
    ("given", "final_std", "schedule"),
    [
        ({}, 0.1, "constant"),
        ({"prior_std": 0.5}, 0.25, "constant"),
        ({"schedule": "early"}, 0.1, "early"),
        ({"kl_lr": 0.01}, None, "bursts"),
        ({"kl_lr": 0.01, "schedule": "constant"}, None, "constant"),
        ({"schedule": "bursts"}, None, "bursts"),
        ({"schedule": "bursts", "final_std": 0.05}, 0.05, "bursts"),
    ],
)
def test_what_is_left_open_depends_on_what_is_given(given, final_std, schedule):
    aim = Aim.of(**{"prior_std": 0.2, **GIVEN, **given})
    assert (aim.final_std, aim.schedule) == (final_std, schedule)
    method = BLoB(**given)
    assert (method.final_std, method.schedule) == (final_std, schedule)
    assert make_method(given, name="blob") == method


def test_a_period_brings_the_bursts_it_is_of():
    assert Aim.of(0.2, None, None, None, period=9) == (0.2, None, None, "bursts")


def test_each_method_has_its_own():
    assert BBB().final_std == pytest.approx(0.02)
    assert BBB(prior_std=1.0, final_std=0.3).final_std == 0.3
    authors = AuthorsBLoB()
    assert (authors.final_std, authors.kl_lr, authors.schedule) == (None, None, "bursts")
    assert AuthorsBLoB(final_std=0.1).schedule == "bursts"


def entries(settings: object) -> list[dict]:
    """All mappings in a configuration that are settings of a method with a KL step."""
    found = []
    for key, value in settings.items() if isinstance(settings, dict) else ():
        name = value.get("method", key) if isinstance(value, dict) else ""
        if isinstance(METHODS.get(name), type) and issubclass(METHODS[name], BLoB):
            found.append(value)
        else:
            found += entries(value)
    return found


@pytest.mark.parametrize("folder", ["paper", "faithful"])
def test_the_papers_presets_name_the_papers_schedule(folder):
    count = 0
    for path in sorted((CONFIGS / folder).glob("*.yaml")):
        for settings in entries(yaml.safe_load(path.read_text(encoding="utf-8"))):
            count += 1
            assert (settings["kl_lr"], settings["schedule"]) == (0.01, "bursts"), path
    assert count >= 9


# Long periods


@pytest.mark.parametrize(
    ("steps", "rows", "batch"), [(200, 10000, 1), (1000, 9427, 1), (200, 50000, 4)]
)
def test_a_period_far_beyond_the_run_divides_by_nothing(steps, rows, batch, caplog):
    torch.manual_seed(0)
    model = adapted(tiny_llama(num_hidden_layers=1)).train()
    bayesify(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.0)
    step = KLStep(final_std=0.1, schedule="bursts", std_lr=0.0)
    step.attach(model, optimizer, total_steps=steps, num_rows=rows, batch_size=batch)
    said = f"the run of {steps} steps ends before the first burst"
    assert said in caplog.text
    assert "all of it falls into the last dozen steps, which leave 0.50 of the mean" in caplog.text
    for layer in model.modules():
        if isinstance(layer, GaussianLinear):
            layer.root_std.grad = torch.zeros_like(layer.root_std)
    for _ in range(steps):
        optimizer.step()
    assert step.state_of_kl()["std_over_prior"] == pytest.approx(0.5, rel=0.01)


def test_a_rate_and_a_run_shorter_than_a_burst_say_how_little_is_taken(caplog):
    period = burst_period(256, 4)
    torch.manual_seed(0)
    model = adapted(tiny_llama(num_hidden_layers=1))
    bayesify(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    KLStep(kl_lr=0.01).attach(model, optimizer, total_steps=150, num_rows=256, batch_size=4)
    taken = kl_weights(150, period).sum().item()
    assert f"(period {period}): it takes {taken:.2g} of one KL" in caplog.text


def test_early_is_near_its_end_after_a_third_and_takes_the_same_kl_evenly_before():
    early = Aim(0.2, None, 1.0, "early").plan(150, 150, 0.06).rates
    assert early.cumsum(0)[50] / early.sum() == pytest.approx(0.88, abs=0.01)
    assert early[49] == early[9] == 1
    decay = warmup_decay(150)
    assert decay.cumsum(0)[75] / decay.sum() == pytest.approx(0.74, abs=0.01)


# Refused before any work


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"final_std": 0.2}, "final_std=0.2, expected 0 < final_std < 0.2"),
        ({"final_std": 0.0}, "final_std=0.0, expected 0 < final_std < 0.2"),
        ({"kl_lr": -1.0}, "expected kl_lr and std_lr ≥ 0"),
        ({"std_lr": -1.0}, "expected kl_lr and std_lr ≥ 0"),
        ({"schedule": "burst"}, "unknown schedule: got 'burst'"),
        ({"prior_std": float("inf")}, "prior_std must be positive: got inf"),
    ],
)
def test_what_cannot_be_aimed_at_is_refused_when_it_is_written_down(given, reason):
    for kind in (KLStep, BLoB, BBB):
        with pytest.raises(Refusal, match=reason):
            kind(**given)


def test_a_schedule_that_leaves_no_step_to_the_kl_is_refused():
    torch.manual_seed(0)
    model = adapted(tiny_llama(num_hidden_layers=1))
    bayesify(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with pytest.raises(Refusal, match="no step is left to the KL: got 1 steps"):
        KLStep(warmup_ratio=1.0).attach(model, optimizer, total_steps=1)
