"""The KL step against the authors' two-optimiser update; in a Trainer, resumed, and refused."""

import copy
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

from bayestune import Refusal
from bayestune.adapters import GaussianLinear, Slots, bayesify
from bayestune.kl import KLStep, burst_period, kl_divergence, kl_weights, warmup_decay
from tiny import BATCH, converted, tiny_llama, with_second

STEPS = 30
KL_LR = 0.02
LR = 1e-3
PRIOR = 0.2


@pytest.fixture
def model() -> nn.Module:
    return converted(tiny_llama(), root_std=0.05).double().train()


@pytest.fixture
def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainable(model).values(), LR)


def layers_of(model: nn.Module, adapter: str | None = None) -> list[GaussianLinear]:
    return list(Slots(model, adapter).of_kind(GaussianLinear).values())


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def likelihood(model: nn.Module, micro: torch.Tensor | None = None) -> None:
    """Gradients of the mean loss over some micro-batches (number, rows, tokens)."""
    micro = BATCH["input_ids"][None] if micro is None else micro
    for ids in micro:
        (model(input_ids=ids, labels=ids).loss / len(micro)).backward()


# Against the authors' code


def authors_update(model: nn.Module, batches: Iterable[torch.Tensor], period: int) -> None:
    """AdamW on M and B with the likelihood, then SGD on M and G with π·KL.

    G's gradient of the likelihood is left in place for SGD.
    """
    layers = layers_of(model)
    roots = {id(layer.root_std) for layer in layers}
    others = [p for p in trainable(model).values() if id(p) not in roots]
    adamw = torch.optim.AdamW(others, LR, eps=1e-6, weight_decay=0)
    sgd = torch.optim.SGD([p for layer in layers for p in layer.parameters()], KL_LR)
    warmup = int(0.06 * STEPS)

    def rate(t: int) -> float:
        return t / warmup if t < warmup else (STEPS - t) / (STEPS - warmup)

    schedules = [LambdaLR(adamw, rate), LambdaLR(sgd, rate)]
    for t, micro in enumerate(batches):
        model.zero_grad()
        likelihood(model, micro)
        adamw.step()
        for layer in layers:
            layer.weight.grad = None
        weight = 2 ** (t % period + 1) / (2 ** (period + 1) - 1)
        kl = sum(kl_divergence(layer.weight, layer.std, PRIOR) for layer in layers)
        (weight * kl).backward()
        sgd.step()
        for schedule in schedules:
            schedule.step()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_decoupled_step_is_the_authors_two_optimiser_update(model, accumulation):
    batches = torch.randint(3, 400, (STEPS, accumulation, 2, 7))
    twin = copy.deepcopy(model)
    torch.manual_seed(0)
    authors_update(twin, batches, period=7)

    optimizer = torch.optim.AdamW(trainable(model).values(), LR, eps=1e-6, weight_decay=0)
    rates = [*warmup_decay(STEPS).tolist(), 0.0]
    schedule = LambdaLR(optimizer, rates.__getitem__)
    KLStep(PRIOR, kl_lr=KL_LR, period=7).attach(model, optimizer, total_steps=STEPS)
    torch.manual_seed(0)
    for micro in batches:
        model.zero_grad()
        likelihood(model, micro)
        optimizer.step()
        schedule.step()

    expected = trainable(twin)
    for name, parameter in trainable(model).items():
        assert_close(parameter, expected[name], atol=1e-6, rtol=0, msg=name)
    assert layers_of(model)[0].std.mean() > 0.01  # from 0.0018: something is compared


# In anyone's Trainer


class Rows(torch.utils.data.Dataset):
    def __init__(self) -> None:
        torch.manual_seed(2)
        self.ids = torch.randint(3, 400, (STEPS * 4, 7))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def trainer(model: nn.Module, folder: Path, callback: KLStep, **changes: Any) -> Trainer:
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": LR,
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 10,
        "use_cpu": True,
    }
    arguments = TrainingArguments(output_dir=str(folder), **{**settings, **changes})
    return Trainer(model.float(), arguments, train_dataset=Rows(), callbacks=[callback])


def test_it_runs_in_anyones_trainer_and_ends_where_it_was_told(model, tmp_path):
    step = KLStep(PRIOR, final_std=0.05, schedule="constant", std_lr=0.0)
    run = trainer(model, tmp_path, step)
    run.train()
    std = sum(layer.std.mean().item() for layer in layers_of(model)) / 4
    assert std == pytest.approx(0.05, rel=0.02)
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(logged) == 3
    last = logged[-1]
    kl = sum(kl_divergence(layer.weight, layer.std, PRIOR).item() for layer in layers_of(model))
    assert last["kl"] == pytest.approx(kl, rel=1e-4)
    assert last["std_over_prior"] == pytest.approx(std / PRIOR, rel=1e-4)
    period = burst_period(STEPS * 4, 4)
    assert last["kl_weight"] == pytest.approx(1 / period)
    rates = kl_weights(STEPS, period, "constant") * warmup_decay(STEPS)
    per_rate = last["kl_lr"] / warmup_decay(STEPS)[-1]
    assert logged[1]["kl_time"] == pytest.approx(float(per_rate * rates[:20].sum()))
    run.optimizer.step()
    assert step.step == STEPS  # it is detached


@pytest.mark.parametrize(("std_optimizer", "has_state"), [("sgd", False), ("adamw", True)])
def test_the_optimiser_takes_the_standard_deviation_only_if_told(
    std_optimizer, has_state, model, tmp_path
):
    run = trainer(model, tmp_path, KLStep(PRIOR, std_optimizer=std_optimizer), max_steps=2)
    run.train()
    state = run.optimizer.optimizer.state
    assert all((layer.root_std in state) is has_state for layer in layers_of(model))


def test_weight_decay_never_reaches_the_standard_deviation(model, tmp_path):
    with pytest.raises(ValueError, match="got weight_decay=0.1 on root_std, expected 0; set weigh"):
        trainer(model, tmp_path, KLStep(std_optimizer="adamw"), weight_decay=0.1).train()
    root = layers_of(model)[0].root_std
    before = root.detach().clone()
    optimizer = torch.optim.AdamW(trainable(model).values(), LR, weight_decay=10.0)
    KLStep(kl_lr=0.0, period=3).attach(model, optimizer, total_steps=3)
    likelihood(model)
    optimizer.step()
    assert torch.equal(root, before)


# In a bare loop


def loop(model: nn.Module, step: KLStep, steps: range) -> None:
    """Plain SGD from a step on, with the noise of each step its own."""
    optimizer = torch.optim.SGD(trainable(model).values(), 0.1)
    step.attach(model, optimizer, total_steps=6, step=steps.start)
    for t in steps:
        torch.manual_seed(t)
        model.zero_grad()
        likelihood(model)
        optimizer.step()
    step.detach()


@pytest.fixture
def second() -> nn.Module:
    """A model whose Gaussian adapter "b" is active beside a Gaussian "default"."""
    model = with_second(converted(tiny_llama()))
    bayesify(model, adapter="b")
    model.set_adapter("b")
    return model.double().train()


def test_a_step_that_is_resumed_ends_as_the_whole_run_for_a_second_adapter_alone(second):
    before = copy.deepcopy(second)
    resumed = copy.deepcopy(second)
    settings = {"period": 3, "kl_lr": 0.02, "adapter": "b"}
    loop(second, KLStep(**settings), range(6))
    loop(resumed, KLStep(**settings), range(2))
    loop(resumed, KLStep(**settings), range(2, 6))
    for whole, parts in zip(layers_of(second, "b"), layers_of(resumed, "b"), strict=True):
        assert torch.equal(whole.root_std, parts.root_std)
        assert torch.equal(whole.weight, parts.weight)
    for after, first in zip(layers_of(second, "b"), layers_of(before, "b"), strict=True):
        assert not torch.equal(after.root_std, first.root_std)
    for after, first in zip(
        layers_of(second, "default"), layers_of(before, "default"), strict=True
    ):
        assert torch.equal(after.root_std, first.root_std)
        assert torch.equal(after.weight, first.weight)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("std_optimizer", ["sgd", "adamw"])
def test_a_closure_steps_as_a_loop_does(std_optimizer, named, model):
    """Lightning gives the optimiser a closure: gradients come inside its step."""
    others = copy.deepcopy(model)
    for each in (model, others):
        optimizer = torch.optim.AdamW(trainable(each).values(), LR, weight_decay=0.0)
        step = KLStep(std_optimizer=std_optimizer, std_lr=0.1, prior_std=PRIOR)
        step.attach(each, optimizer, total_steps=4)
        for turn in range(4):
            torch.manual_seed(turn)

            def gradients(each=each, optimizer=optimizer):
                optimizer.zero_grad()
                likelihood(each)
                return torch.tensor(0.0)

            if each is model:
                gradients()
                optimizer.step()
            elif named:
                optimizer.step(closure=gradients)
            else:
                optimizer.step(gradients)
        step.detach()
    start = converted(tiny_llama(), root_std=0.05).double()
    for one, other, first in zip(*map(layers_of, (model, others, start)), strict=True):
        assert torch.equal(one.root_std, other.root_std)
        assert torch.equal(one.weight, other.weight)
        assert not torch.equal(one.root_std, first.root_std)


@pytest.mark.parametrize(
    ("settings", "rate"),
    [
        ({"kl_lr": 0.0, "std_lr": 0.3}, 0.3),
        ({"kl_lr": 0.004}, 0.004),
        ({}, 0.01),
        ({"final_std": 0.1}, 0.01),  # not the rate that is solved for
    ],
)
def test_the_likelihood_takes_g_at_a_rate_of_its_own(settings, rate, model):
    settings = {"period": 1, "warmup_ratio": 0.0, **settings}
    twin = copy.deepcopy(model)
    for std_lr, one in (({}, model), ({"std_lr": 0.0}, twin)):
        optimizer = torch.optim.SGD(trainable(one).values(), 0.0)
        KLStep(**{**settings, **std_lr}).attach(one, optimizer, total_steps=2)
        torch.manual_seed(0)
        likelihood(one)
        gradients = [layer.root_std.grad for layer in layers_of(one)]
        optimizer.step()
    for layer, without, gradient in zip(layers_of(model), layers_of(twin), gradients, strict=True):
        assert gradient.abs().max() > 0
        assert_close(without.root_std - layer.root_std, rate * gradient)


def test_attaching_again_takes_the_first_hooks_off(model, optimizer):
    step = KLStep(period=1)
    for _ in range(2):
        step.attach(model, optimizer, total_steps=6)
    likelihood(model)
    optimizer.step()
    assert step.step == 1


def test_a_step_that_a_gradient_scaler_skips_takes_no_kl(model, optimizer):
    step = KLStep(period=3)
    step.attach(model, optimizer, total_steps=3)
    scaler = torch.amp.GradScaler("cpu")
    before = copy.deepcopy(model.state_dict())
    loss = model(**BATCH, labels=BATCH["input_ids"]).loss
    (scaler.scale(loss) * math.inf).backward()
    scaler.step(optimizer)
    assert step.step == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_run_shorter_than_a_burst_is_warned_of(model, optimizer, caplog):
    for step, total in ((KLStep(period=10), 10), (KLStep(period=10, schedule="constant"), 9)):
        step.attach(model, optimizer, total_steps=total)
        step.detach()
    assert caplog.text == ""
    KLStep(period=10).attach(model, optimizer, total_steps=9)
    assert "the run of 9 steps ends before the first burst of the KL (period 10)" in caplog.text


def test_a_run_longer_than_its_plan_is_warned_of_once(model, optimizer, caplog):
    KLStep(period=1, kl_lr=1e-4).attach(model, optimizer, total_steps=2)
    for _ in range(4):
        optimizer.zero_grad()
        likelihood(model)
        optimizer.step()
    assert caplog.text.count("the KL's plan of 2 steps is over, but the run goes on") == 1


# Refusals


def test_a_model_whose_adapters_are_not_called_is_noticed(model, optimizer):
    KLStep(period=3).attach(model, optimizer, total_steps=3)
    with pytest.raises(ValueError, match="no gradient reached any of the 4 .*fused kernel"):
        optimizer.step()


REFUSED = [
    ({"final_std": 0.1, "kl_lr": 0.01}, "not both: got final_std=0.1 and kl_lr=0.01"),
    ({"std_optimizer": "adam"}, "unknown std_optimizer: got 'adam'"),
    ({"prior_std": 0}, "prior_std must be positive: got 0"),
    ({"schedule": "burst", "period": 2}, "unknown schedule: got 'burst'"),
    ({"kl_lr": 0.1}, "the KL's period is not known: got no period, expected num_rows"),
    ({"final_std": 0.3, "period": 3}, "expected .* < final_std < 0.2"),
]


@pytest.mark.parametrize(("settings", "reason"), REFUSED)
def test_settings_that_make_no_sense_are_refused(settings, reason, model, optimizer):
    with pytest.raises(ValueError, match=reason):
        KLStep(**settings).attach(model, optimizer, total_steps=3)


@pytest.mark.parametrize("owner", ["sgd", "adamw"])
def test_a_second_step_on_the_same_layers_is_refused(model, owner):
    """Under "adamw" it would take the KL twice, in silence."""
    optimizer = torch.optim.AdamW(trainable(model).values(), LR, weight_decay=0.0)
    first = KLStep(final_std=0.1, std_optimizer=owner)
    first.attach(model, optimizer, total_steps=STEPS)
    second = KLStep(final_std=0.1, std_optimizer=owner)
    with pytest.raises(Refusal, match="a KL step acts on these layers already"):
        second.attach(model, optimizer, total_steps=STEPS)
    first.detach()
    second.attach(model, optimizer, total_steps=STEPS)


@pytest.mark.parametrize("wrong", [{"num_rows": -1}, {"num_rows": 0}, {"batch_size": 0}])
def test_rows_and_batches_are_counted(model, optimizer, wrong):
    with pytest.raises(Refusal, match="a period is of rows and batches: got num_rows"):
        KLStep(kl_lr=KL_LR).attach(
            model, optimizer, total_steps=STEPS, **{"num_rows": 9, "batch_size": 4, **wrong}
        )


def test_an_adapter_that_is_not_gaussian_is_refused_by_name(model, optimizer):
    with_second(model)
    with pytest.raises(ValueError, match="got the deterministic adapter 'b'; call bayesify"):
        KLStep(period=1, adapter="b").attach(model, optimizer, total_steps=2)


def test_the_state_of_a_step_that_is_not_attached_is_refused():
    with pytest.raises(RuntimeError, match="the KL step is not attached: got no plan, expected"):
        KLStep().state_of_kl()
