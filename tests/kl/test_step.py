"""The KL step against the authors' two-optimiser update, its schedule, and what it refuses."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from bayestune.adapters import GaussianLinear, Slots, bayesify
from bayestune.kl import KLStep, burst_period, kl_divergence, kl_weights, warmup_decay

STEPS, KL_LR, LR, PRIOR = 30, 0.02, 1e-3, 0.2


@pytest.fixture
def model(llama):
    adapted = get_peft_model(llama(), LoraConfig(target_modules=["q_proj", "v_proj"]))
    bayesify(adapted)
    return adapted.double().train()


def batches(accumulation: int) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        [torch.randint(3, 400, (2, 7), generator=generator) for _ in range(accumulation)]
        for _ in range(STEPS)
    ]


def likelihood(model: nn.Module, micro: list[torch.Tensor]) -> None:
    for ids in micro:
        (model(input_ids=ids, labels=ids).loss / len(micro)).backward()


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def authors_update(model: nn.Module, micros, period: int) -> None:
    """AdamW on M and B with the likelihood; then SGD on M and G with π·KL, G's likelihood gradient left in place."""
    layers = list(Slots(model).of_kind(GaussianLinear).values())
    roots = {id(layer.root_std) for layer in layers}
    adamw = torch.optim.AdamW(
        [p for p in trainable(model).values() if id(p) not in roots], LR, eps=1e-6, weight_decay=0
    )
    sgd = torch.optim.SGD([p for layer in layers for p in (layer.weight, layer.root_std)], KL_LR)
    warmup = int(0.06 * STEPS)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            o, lambda t: t / warmup if t < warmup else (STEPS - t) / (STEPS - warmup)
        )
        for o in (adamw, sgd)
    ]
    for t, micro in enumerate(micros):
        model.zero_grad()
        likelihood(model, micro)
        adamw.step()
        for layer in layers:
            layer.weight.grad = None
        weight = 2 ** (t % period + 1) / (2 ** (period + 1) - 1)
        (weight * sum(kl_divergence(layer.weight, layer.std, PRIOR) for layer in layers)).backward()
        sgd.step()
        for schedule in schedules:
            schedule.step()


@pytest.mark.parametrize("accumulation", [1, 2, 8])
def test_the_decoupled_step_is_the_authors_two_optimiser_update(model, accumulation):
    period, micros, twin = 7, batches(accumulation), copy.deepcopy(model)
    torch.manual_seed(0)
    authors_update(twin, micros, period)

    optimizer = torch.optim.AdamW(trainable(model).values(), LR, eps=1e-6, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, warmup_decay(STEPS).tolist().__getitem__
    )
    step = KLStep(PRIOR, kl_lr=KL_LR, period=period)
    step.attach(model, optimizer, total_steps=STEPS)
    torch.manual_seed(0)
    for t, micro in enumerate(micros):
        model.zero_grad()
        likelihood(model, micro)
        optimizer.step()
        if t + 1 < STEPS:
            schedule.step()

    expected = trainable(twin)
    for name, parameter in trainable(model).items():
        torch.testing.assert_close(parameter, expected[name], atol=1e-6, rtol=0, msg=name)
    moved = next(iter(Slots(model).of_kind(GaussianLinear).values())).std.mean().item()
    assert moved > 0.01  # from 0.0018: the comparison is of something


class Rows(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.ids = torch.randint(3, 400, (STEPS * 4, 7), generator=torch.Generator().manual_seed(2))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def trainer(model, folder, callback, **changes) -> Trainer:
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": LR,
        "warmup_steps": int(0.06 * STEPS),
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 10,
        "use_cpu": True,
        "seed": 0,
    }
    arguments = TrainingArguments(output_dir=str(folder), **{**settings, **changes})
    return Trainer(model, arguments, train_dataset=Rows(), callbacks=[callback])


def test_it_runs_in_anyones_trainer_and_ends_where_it_was_told(model, tmp_path):
    step = KLStep(PRIOR, final_std=0.05, schedule="constant", std_lr=0.0)
    run = trainer(model.float(), tmp_path, step)
    run.train()
    stds = torch.cat(
        [layer.std.flatten() for layer in Slots(model).of_kind(GaussianLinear).values()]
    )
    assert stds.mean().item() == pytest.approx(0.05, rel=0.02)
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(logged) == 3
    kl = sum(
        kl_divergence(layer.weight, layer.std, PRIOR).item()
        for layer in Slots(model).of_kind(GaussianLinear).values()
    )
    assert logged[-1]["kl"] == pytest.approx(kl, rel=1e-4)
    assert logged[-1]["std_over_prior"] == pytest.approx(stds.mean().item() / PRIOR, rel=1e-4)
    assert logged[-1]["kl_weight"] == pytest.approx(1 / burst_period(STEPS * 4, 4))
    plan = step._plan
    assert logged[1]["kl_time"] == pytest.approx(float((plan.weights * plan.rates)[:20].sum()))
    assert not run.optimizer.optimizer._optimizer_step_pre_hooks  # detached


def test_the_optimiser_takes_the_standard_deviation_only_if_told(model, tmp_path):
    for std_optimizer, has_state in (("sgd", False), ("adamw", True)):
        twin = copy.deepcopy(model).float()
        run = trainer(twin, tmp_path, KLStep(PRIOR, std_optimizer=std_optimizer), max_steps=2)
        run.train()
        state = run.optimizer.optimizer.state
        assert all(
            (layer.root_std in state) is has_state
            for layer in Slots(twin).of_kind(GaussianLinear).values()
        )


def test_weight_decay_never_reaches_the_standard_deviation(model, tmp_path):
    with pytest.raises(
        ValueError, match="got weight_decay=0.1 on root_std, expected 0; set weight_decay=0 or"
    ):
        trainer(model.float(), tmp_path, KLStep(std_optimizer="adamw"), weight_decay=0.1).train()
    layer = next(iter(Slots(model).of_kind(GaussianLinear).values()))
    before = layer.root_std.detach().clone()
    optimizer = torch.optim.AdamW(trainable(model).values(), LR, weight_decay=10.0)
    KLStep(kl_lr=0.0, period=3).attach(model, optimizer, total_steps=3)
    ids = torch.arange(3, 17)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert torch.equal(layer.root_std, before)


def test_a_model_whose_adapters_are_not_called_is_noticed(model):
    optimizer = torch.optim.AdamW(trainable(model).values(), LR)
    KLStep(period=3).attach(model, optimizer, total_steps=3)
    with pytest.raises(
        RuntimeError, match="no gradient reached any of the 4 Gaussian layers: .*fused kernel"
    ):
        optimizer.step()


def test_a_step_that_a_gradient_scaler_skips_takes_no_kl(model):
    optimizer = torch.optim.AdamW(trainable(model).values(), LR)
    step = KLStep(period=3)
    step.attach(model, optimizer, total_steps=3)
    scaler = torch.amp.GradScaler("cpu")
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    ids = torch.arange(3, 17)[None]
    (scaler.scale(model(input_ids=ids, labels=ids).loss) * math.inf).backward()
    scaler.step(optimizer)
    assert step.step == 0
    assert all(torch.equal(p, before[name]) for name, p in trainable(model).items())


@pytest.mark.parametrize("period", [1, 3, 60])
def test_bursts_are_the_papers_weights_and_sum_to_about_one_a_period(period):
    weights = kl_weights(2 * period, period)
    exact = [2**i / (2 ** (period + 1) - 1) for i in range(1, period + 1)]
    torch.testing.assert_close(weights, torch.tensor(exact * 2, dtype=torch.float64))
    assert weights[:period].sum().item() == pytest.approx(1, abs=2.0**-period)
    assert kl_weights(2 * period, period, "constant")[:period].sum().item() == pytest.approx(1)


def test_a_long_period_does_not_overflow():
    weights = kl_weights(5000, 5000)
    assert weights.isfinite().all()
    assert weights[-1].item() == pytest.approx(0.5)


def test_the_multiplier_is_transformers_linear_schedule():
    from transformers import get_linear_schedule_with_warmup

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
    schedule = get_linear_schedule_with_warmup(optimizer, int(0.06 * 50), 50)
    rates = []
    for _ in range(50):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(warmup_decay(50), torch.tensor(rates, dtype=torch.float64))
    assert warmup_decay(10, 0.0)[0] == 1


def test_a_run_shorter_than_a_burst_is_warned_of(model, caplog):
    optimizer = torch.optim.AdamW(trainable(model).values(), LR)
    KLStep(period=10).attach(model, optimizer, total_steps=10)
    assert caplog.text == ""
    KLStep(period=10, schedule="constant").attach(model, optimizer, total_steps=9)
    assert caplog.text == ""
    KLStep(period=10).attach(model, optimizer, total_steps=9)
    assert "the run of 9 steps ends before the first burst of the KL (period 10)" in caplog.text


def test_bad_settings_are_refused(model):
    optimizer = torch.optim.AdamW(trainable(model).values(), LR)
    with pytest.raises(
        ValueError, match="give final_std or kl_lr, not both: got final_std=0.1 and kl_lr=0.01"
    ):
        KLStep(final_std=0.1, kl_lr=0.01)
    with pytest.raises(ValueError, match="unknown std_optimizer: got 'adam'"):
        KLStep(std_optimizer="adam")
    with pytest.raises(ValueError, match="prior_std must be positive: got 0"):
        KLStep(0)
    with pytest.raises(ValueError, match="unknown schedule: got 'burst'"):
        KLStep(schedule="burst", period=2).attach(model, optimizer, total_steps=3)
    with pytest.raises(
        ValueError, match="the KL's period is not known: got no period, expected num_rows"
    ):
        KLStep().attach(model, optimizer, total_steps=3)
    with pytest.raises(ValueError, match="expected .* < final_std < 0.2"):
        KLStep(final_std=0.3, period=3).attach(model, optimizer, total_steps=3)
    with pytest.raises(ValueError, match="the model has no Gaussian layer"):
        KLStep(period=3).attach(model.unload(), optimizer, total_steps=3)


def test_a_run_longer_than_its_plan_is_warned_of_once(model, caplog):
    optimizer = torch.optim.SGD(trainable(model).values(), 0.0)
    step = KLStep(period=1, kl_lr=1e-4)
    step.attach(model, optimizer, total_steps=2)
    for _ in range(4):
        optimizer.zero_grad()
        model(input_ids=torch.arange(3, 17)[None], labels=torch.arange(3, 17)[None]).loss.backward()
        optimizer.step()
    assert caplog.text.count("the KL's plan of 2 steps is over, but the run goes on") == 1


def test_the_state_of_a_step_that_is_not_attached_is_refused():
    with pytest.raises(RuntimeError, match="the KL step is not attached: got no plan, expected"):
        KLStep().state_of_kl()
