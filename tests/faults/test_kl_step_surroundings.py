"""The KL step asks its surroundings instead of trusting them: every kind of set-up people have."""

import copy
import json
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.optimizers import create_lorafa_optimizer
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from bayestune import Refusal, save_posterior
from bayestune.adapters import GaussianLinear, Slots, bayesify
from bayestune.kl import KLStep
from tiny import adapted, tiny_llama, with_second

STEPS = 30
LEFT_OUT = ["model.layers.0.self_attn.q_proj.lora_A"]


class Rows(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.ids = torch.randint(3, 400, (64, 6), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        return iter(Rows())


def gaussian(**how: Any) -> nn.Module:
    torch.manual_seed(4)
    model = adapted(tiny_llama(num_hidden_layers=1))
    bayesify(model, **how)
    return model.train()


def layers_of(model: nn.Module, adapter: str | None = None) -> list[GaussianLinear]:
    return list(Slots(model, adapter).of_kind(GaussianLinear).values())


def mean_std(model: nn.Module, adapter: str | None = None) -> float:
    stds = [layer.root_std.detach().float().square().mean() for layer in layers_of(model, adapter)]
    return torch.stack(stds).mean().item()


def size(model: nn.Module) -> float:
    return sum(layer.weight.detach().float().square().sum() for layer in layers_of(model)).item()


def sgd(model: nn.Module, rate: float = 0.0) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], rate)


def backward(model: nn.Module, factor: float = 1.0) -> torch.Tensor:
    ids = Rows().ids[:4]
    loss = model(input_ids=ids, labels=ids).loss * factor
    loss.backward()
    return loss


def loop(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        backward(model)
        optimizer.step()
        optimizer.zero_grad()


def trainer(
    model: nn.Module, folder: Path, *callbacks: TrainerCallback, rows: Any = None, **changes: Any
) -> Trainer:
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 10,
        "use_cpu": True,
    }
    held_out = changes.pop("eval_dataset", None)
    arguments = TrainingArguments(output_dir=str(folder), **{**settings, **changes})
    rows = rows or Rows()
    return Trainer(
        model, arguments, train_dataset=rows, eval_dataset=held_out, callbacks=list(callbacks)
    )


# Low precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast", ["before", "after"])
def test_small_steps_add_up_in_low_precision(dtype, cast):
    model = gaussian()
    twin = copy.deepcopy(model)
    optimizer = sgd(model)
    before = size(model)
    if cast == "before":
        model.to(dtype)
    step = KLStep(schedule="constant", std_lr=0.0)
    step.attach(model, optimizer, total_steps=400)
    if cast == "after":
        model.to(dtype)
    precise = sgd(twin)
    KLStep(schedule="constant", std_lr=0.0).attach(twin, precise, total_steps=400)
    for one, adam in ((model, optimizer), (twin, precise)):
        for layer in layers_of(one):
            layer.root_std.grad = torch.zeros_like(layer.root_std)
        for _ in range(400):  # the first gradients are checked, the others may be missing
            adam.step()
    assert mean_std(model) == pytest.approx(mean_std(twin), rel=0.01)
    assert size(model) / before == pytest.approx(size(twin) / before, rel=0.01)
    assert size(twin) / before == pytest.approx(0.5**2, rel=0.05)


class OwnCopies(torch.optim.SGD):
    """Keeps float32 copies of its parameters and casts them at each step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if "master" not in state:
                state["moment"] = torch.ones_like(parameter, dtype=torch.float32)
                state["master"] = parameter.detach().float().clone()
            if parameter.grad is not None:
                state["master"].add_(parameter.grad.float(), alpha=-self.param_groups[0]["lr"])
            parameter.copy_(state["master"])


def test_an_optimiser_with_float32_copies_of_its_own_does_not_undo_the_step():
    model = gaussian().to(torch.bfloat16)
    optimizer = OwnCopies([p for p in model.parameters() if p.requires_grad], 0.0)
    before = size(model)
    KLStep(std_lr=0.0).attach(model, optimizer, total_steps=100)
    loop(model, optimizer, 100)
    assert mean_std(model) == pytest.approx(0.1, rel=0.01)
    assert size(model) / before == pytest.approx(0.25, rel=0.07)


def test_a_bfloat16_run_that_is_resumed_goes_on_without_a_jump(tmp_path):
    model = gaussian().to(torch.bfloat16)
    step = KLStep(std_lr=0.0)
    optimizer = sgd(model)
    step.attach(model, optimizer, total_steps=60)
    loop(model, optimizer, 30)
    state = json.loads(json.dumps(step.state_dict()))
    here = mean_std(model)
    step.detach()
    other = KLStep(std_lr=0.0)
    other.load_state_dict(state)
    other.attach(model, optimizer, total_steps=60, step=30)
    loop(model, optimizer, 1)
    assert mean_std(model) == pytest.approx(here, rel=0.05)
    loop(model, optimizer, 29)
    assert mean_std(model) == pytest.approx(0.1, rel=0.01)


class ScheduleFree(torch.optim.Optimizer):
    """Steps on iterates z and pulls the parameters towards them, as Defazio et al. (2024) do."""

    def __init__(self, params: Any, rate: float) -> None:
        super().__init__(params, {"lr": rate, "steps": 0})

    def eval(self) -> None:
        """Puts the average x where y was: y = 0.1 z + 0.9 x."""
        self._mix(1 - 1 / 0.9)

    def train(self) -> None:
        self._mix(0.1)

    @torch.no_grad()
    def _mix(self, weight: float) -> None:
        for parameter, state in self.state.items():
            parameter.lerp_(state["z"], weight)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        (group,) = self.param_groups
        group["steps"] += 1
        share = 1 / group["steps"]
        for parameter in group["params"]:
            if parameter.grad is not None:
                iterate = self.state[parameter].setdefault("z", parameter.detach().clone())
                parameter.lerp_(iterate, share)
                parameter.sub_(parameter.grad, alpha=group["lr"] * (1 - 0.9 * (1 - share)))
                iterate.sub_(parameter.grad, alpha=group["lr"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("std_optimizer", ["sgd", "adamw"])
def test_an_optimiser_that_averages_its_iterates_keeps_all_of_the_step(std_optimizer, dtype):
    model = gaussian().to(dtype)
    optimizer = ScheduleFree([p for p in model.parameters() if p.requires_grad], 0.0)
    before = size(model)
    step = KLStep(std_lr=0.0, std_optimizer=std_optimizer)
    step.attach(model, optimizer, total_steps=100)
    loop(model, optimizer, 100)
    for _ in range(2):
        assert mean_std(model) == pytest.approx(0.1, rel=0.02)
        assert size(model) / before == pytest.approx(0.25, rel=0.07)
        optimizer.eval()


class MadeScheduleFree:
    """Lets another optimiser step on z in the parameters' place; no torch optimiser itself."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base = base
        self.steps = 0

    @property
    def param_groups(self) -> Any:
        return self.base.param_groups

    @property
    def state(self) -> Any:
        return self.base.state

    def zero_grad(self) -> None:
        self.base.zero_grad()

    def eval(self) -> None:
        """Puts the average x in the place of y = 0.1 z + 0.9 x."""
        for parameter, state in self.state.items():
            parameter.data.lerp_(state["z"], 1 - 1 / 0.9)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.steps += 1
        learnt = [p for p in self.param_groups[0]["params"] if p.grad is not None]
        averages = []
        for parameter in learnt:
            iterate = self.state[parameter].setdefault("z", parameter.detach().clone())
            averages.append(parameter.lerp(iterate, 1 - 1 / 0.9))
            parameter.copy_(iterate)
        self.base.step()
        for parameter, average in zip(learnt, averages, strict=True):
            self.state[parameter]["z"].copy_(parameter)
            average.lerp_(parameter, 1 / self.steps)
            parameter.copy_(average.lerp(parameter, 0.1))


def test_a_wrapper_that_averages_another_optimisers_iterates_keeps_all_of_the_step():
    model = gaussian()
    optimizer: Any = MadeScheduleFree(sgd(model))
    before = size(model)
    step = KLStep(std_lr=0.0)
    step.attach(model, optimizer, total_steps=100)
    loop(model, optimizer, 100)
    for _ in range(2):
        assert mean_std(model) == pytest.approx(0.1, rel=0.02)
        assert size(model) / before == pytest.approx(0.25, rel=0.07)
        optimizer.eval()
    step.detach()
    loop(model, optimizer, 1)
    assert step.step == 100


def test_the_optimiser_inside_such_a_wrapper_is_refused():
    model = gaussian()
    optimizer: Any = MadeScheduleFree(sgd(model))
    KLStep().attach(model, optimizer.base, total_steps=100)
    with pytest.raises(Refusal, match="got the optimiser inside it, SGD, expected the wrapper"):
        loop(model, optimizer, 1)


# Where the standard deviation is


def test_a_second_run_ends_where_it_is_told(tmp_path, caplog):
    model = gaussian()
    for final_std, reached in ((0.05, 0.05), (0.1, 0.1), (0.1, 0.1)):
        trainer(model, tmp_path, KLStep(final_std=final_std)).train()
        assert mean_std(model) == pytest.approx(reached, rel=0.02)
    assert caplog.text.count("is at final_std (0.1) already: the KL has nothing left to take") == 1
    with pytest.raises(Refusal, match=r"got final_std=0.05, expected at least 0.*upwards"):
        trainer(model, tmp_path, KLStep(final_std=0.05)).train()


class StopAt(TrainerCallback):
    """Ends a run early; the steps before are the better ones."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step == self.step

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["metrics"]["eval_loss"] = float(state.global_step)


@pytest.mark.parametrize("how", ["whole", "stopped", "best"])
def test_a_run_that_ends_before_the_standard_deviation_is_there_says_so(how, tmp_path, caplog):
    best = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 10, "save_steps": 10}
    changes = {**best, "load_best_model_at_end": True, "eval_dataset": Rows()}
    stop = StopAt(12 if how == "stopped" else STEPS)
    model = gaussian()
    run = trainer(model, tmp_path, KLStep(), stop, **(changes if how == "best" else {}))
    run.train()
    told = [one for one in caplog.messages if "at the end of the run" in one]
    if how == "whole":
        assert not told
        assert mean_std(model) == pytest.approx(0.1, rel=0.02)
    else:
        (line,) = told
        assert f"is {mean_std(model):.3g} at the end of the run, not final_std (0.1)" in line
        assert mean_std(model) < 0.08


def test_a_posterior_that_is_saved_before_its_kl_is_taken_is_said_once(tmp_path, caplog):
    """As where total_steps counts batches, and an optimiser's step takes four of them."""
    model = gaussian()
    optimizer = sgd(model)
    step = KLStep()
    step.attach(model, optimizer, total_steps=40)
    loop(model, optimizer, 10)
    for _ in range(2):
        save_posterior(model, tmp_path / "short")
    (line,) = [one for one in caplog.messages if "the posterior is saved after" in one]
    assert "after 10 of the KL's 40 steps" in line
    assert f"a standard deviation of {mean_std(model):.3g} so far" in line
    step.detach()
    step.attach(model, optimizer, total_steps=5)
    loop(model, optimizer, 5)
    save_posterior(model, tmp_path / "whole")
    trainer(gaussian(), tmp_path, KLStep(), Saves()).train()
    assert caplog.text.count("the posterior is saved after") == 1


class Saves(TrainerCallback):
    """Saves in the midst of a run."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            save_posterior(kwargs["model"], args.output_dir)


class OutOfMemory(TrainerCallback):
    """Fails once, as a batch that is too large does."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.train_batch_size == args.train_batch_size:
            raise RuntimeError("CUDA out of memory.")


def test_a_batch_that_the_trainer_made_smaller_has_its_own_period(tmp_path):
    step = KLStep(kl_lr=0.001, schedule="constant")
    found = trainer(gaussian(), tmp_path, step, OutOfMemory(), auto_find_batch_size=True)
    found.train()
    smaller = found.state.train_batch_size
    assert smaller < found.args.train_batch_size
    own = KLStep(kl_lr=0.001, schedule="constant")
    trainer(gaussian(), tmp_path, own, per_device_train_batch_size=smaller).train()
    times = [one.state_of_kl()["kl_time"] for one in (step, own)]
    assert times[0] == pytest.approx(times[1], rel=1e-6)


def test_resumed_to_more_steps_it_still_ends_where_it_is_told(tmp_path):
    steps = {"save_strategy": "steps", "save_steps": 10}
    whole = gaussian()
    trainer(whole, tmp_path / "whole", KLStep(), **steps).train()
    for total, same in ((STEPS, True), (2 * STEPS, False)):
        model = gaussian()
        run = trainer(model, tmp_path / str(total), KLStep(), max_steps=total, **steps)
        run.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-10"))
        assert mean_std(model) == pytest.approx(0.1, rel=0.01)
        roots = zip(layers_of(model), layers_of(whole), strict=True)
        assert all(torch.equal(a.root_std, b.root_std) for a, b in roots) is same
        kl_time = run.state.log_history[-2]["kl_time"]
        assert kl_time == pytest.approx(0.0247, rel=0.01 if same else 0.05)


# Gradient scalers


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("clips", [True, False])
def test_a_scaler_reaches_neither_g_nor_the_kl_of_a_skipped_step(fused, clips):
    roots = []
    for scale in (1.0, 2.0**14):
        model = gaussian()
        learnt = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learnt, 1e-3, fused=fused)
        step = KLStep(final_std=0.1, std_lr=0.5)
        step.attach(model, optimizer, total_steps=6)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        for i in range(7):
            torch.manual_seed(i)
            ids = Rows().ids[:4]
            loss = scaler.scale(model(input_ids=ids, labels=ids).loss)
            (loss * float("inf") if i == 3 else loss).backward()
            if clips:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update(scale)
            optimizer.zero_grad()
            assert step.step == i + 1 - (i >= 3)
        assert mean_std(model) == pytest.approx(0.1, rel=0.02)
        roots.append(torch.cat([layer.root_std.detach().flatten() for layer in layers_of(model)]))
    torch.testing.assert_close(roots[0], roots[1], rtol=1e-4, atol=1e-6)


def test_what_a_trainer_skips_is_taken_later(tmp_path):
    class Skips(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            torch_optimizer = kwargs["optimizer"].optimizer
            torch_optimizer.found_inf = torch.tensor(float(state.global_step in (2, 3, 11)))

    model = gaussian()
    step = KLStep(std_lr=0.0)
    run = trainer(model, tmp_path, step, Skips())
    run.train()
    assert step.step == STEPS
    assert mean_std(model) == pytest.approx(0.1, rel=0.01)


def test_a_run_whose_last_steps_are_skipped_says_where_it_ended(tmp_path, caplog):
    class Skips(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            kwargs["optimizer"].optimizer.found_inf = torch.tensor(float(state.global_step > 9))

    model = gaussian()
    trainer(model, tmp_path, KLStep(), Skips()).train()
    (line,) = [one for one in caplog.messages if "at the end of the run" in one]
    assert f"is {mean_std(model):.3g} at the end of the run, not final_std (0.1)" in line


# Gradients that are missing


def test_a_layer_whose_noise_is_bypassed_is_refused_by_name():
    model = gaussian()
    layer = Slots(model).modules()[LEFT_OUT[0]]
    layer.forward = lambda x: nn.functional.linear(x, layer.weight)  # as a fused kernel does
    optimizer = sgd(model)
    KLStep().attach(model, optimizer, total_steps=3)
    backward(model)
    with pytest.raises(Refusal, match=r"reached 1 of the 2 .*layers.0.self_attn.q_proj.*fused"):
        optimizer.step()


def test_a_layer_that_no_batch_calls_is_named_once(caplog):
    model = gaussian()
    plain = Slots(model).layers["model.layers.0.self_attn.q_proj"]
    plain.forward = plain.base_layer.forward  # as an expert that no token is sent to
    optimizer = sgd(model)
    KLStep().attach(model, optimizer, total_steps=50)
    loop(model, optimizer, 45)
    said = "no gradient has reached 1 of the 2 Gaussian layers in 20 steps, such as model.layers.0"
    assert caplog.text.count(said) == 1


def test_a_model_left_in_evaluation_mode_is_refused():
    model = gaussian().eval()
    optimizer = sgd(model)
    KLStep().attach(model, optimizer, total_steps=3)
    backward(model)
    with pytest.raises(Refusal, match="at its mean: got 2 .* in evaluation mode.*model.train()"):
        optimizer.step()


def test_a_model_that_an_evaluation_leaves_in_its_mode_is_said_once(caplog):
    model = gaussian()
    optimizer = sgd(model)
    KLStep().attach(model, optimizer, total_steps=9)
    loop(model, optimizer, 3)
    assert "evaluation mode" not in caplog.text
    model.eval()
    loop(model, optimizer, 3)
    assert caplog.text.count("in evaluation mode in step 4 of the run: its gradients are the") == 1
    model.train()
    loop(model, optimizer, 3)
    assert mean_std(model) == pytest.approx(0.1, rel=0.02)


def test_frozen_layers_are_left_as_they_are():
    model = gaussian()
    frozen, learnt = layers_of(model)
    frozen.requires_grad_(False)
    before = copy.deepcopy(frozen.state_dict())
    optimizer = sgd(model)
    KLStep(std_lr=0.0).attach(model, optimizer, total_steps=20)
    loop(model, optimizer, 20)
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())
    assert learnt.std.mean().item() == pytest.approx(0.1, rel=0.01)
    learnt.requires_grad_(False)
    with pytest.raises(Refusal, match="no standard deviation is trained: got 2 frozen root_std"):
        KLStep().attach(model, optimizer, total_steps=20)


# What was built before bayesify


@pytest.mark.parametrize("std_optimizer", ["sgd", "adamw"])
def test_an_optimiser_built_before_bayesify_is_refused(std_optimizer):
    model = adapted(tiny_llama())
    optimizer = sgd(model)
    bayesify(model)
    with pytest.raises(Refusal, match=r"does not hold the standard deviations.*after bayesify"):
        KLStep(std_optimizer=std_optimizer).attach(model, optimizer, total_steps=3)


class Fused(torch.optim.SGD):
    """Steps in hooks of the parameters, as LOMO does; its step is never called."""

    def fused_backward(self, loss: torch.Tensor, rate: float) -> None:
        loss.backward()


class Releasing(torch.optim.SGD):
    def __init__(self, params: Any, rate: float) -> None:
        super().__init__(params, rate)
        self.defaults["gradient_release"] = True


class LayerWiseDummyOptimizer(torch.optim.SGD):
    pass


@pytest.mark.parametrize("kind", [Fused, Releasing, LayerWiseDummyOptimizer])
def test_an_optimiser_that_steps_inside_the_backward_pass_is_refused(kind):
    model = gaussian()
    optimizer = kind([p for p in model.parameters() if p.requires_grad], 0.1)
    with pytest.raises(Refusal, match=f"got {kind.__name__}, which steps inside the backward pass"):
        KLStep().attach(model, optimizer, total_steps=3)


class DualAveraging(torch.optim.Optimizer):
    """As MADGRAD without its cube root: each step starts where the parameter began."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in [one for one in group["params"] if one.grad is not None]:
                state = self.state[parameter]
                start = state.setdefault("x0", parameter.detach().clone())
                sum_of_gradients = state.setdefault("s", torch.zeros_like(parameter))
                sum_of_gradients.add_(parameter.grad)
                parameter.copy_(start - group["lr"] * sum_of_gradients)


class Lookahead:
    """Pulls the parameters of the optimiser inside it halfway back to slow ones."""

    def __init__(self, optimizer: torch.optim.Optimizer, k: int = 5) -> None:
        self.optimizer = optimizer
        self.k = k
        self.steps = 0
        self.slow = {p: p.detach().clone() for g in self.param_groups for p in g["params"]}

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        self.optimizer.step()
        self.steps += 1
        for parameter, slow in self.slow.items() if self.steps % self.k == 0 else ():
            slow.lerp_(parameter, 0.5)
            parameter.copy_(slow)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", [DualAveraging, lambda given: Lookahead(torch.optim.AdamW(given))])
def test_an_optimiser_that_takes_the_kl_back_between_its_steps_is_refused(kind, inside):
    model = gaussian()
    optimizer = kind([p for p in model.parameters() if p.requires_grad])
    if inside:  # as in a Trainer
        optimizer = SimpleNamespace(optimizer=optimizer)
    state = torch.get_rng_state()
    with pytest.raises(Refusal, match="takes the KL step back: got .* expected one that goes on"):
        KLStep(final_std=0.1).attach(model, optimizer, total_steps=STEPS)
    assert torch.equal(torch.get_rng_state(), state)


class MovingStart(torch.optim.Optimizer):
    """Goes on from the parameter's value, as Prodigy does, and is known to nobody."""

    def __init__(self, params: Any, lr: float = 0.0, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        print("weights decay by", weight_decay)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in [one for one in group["params"] if one.grad is not None]:
                self.state[parameter].setdefault("p0", parameter.detach().clone())
                if group["weight_decay"] > 0.01:  # a strong one, at any learning rate
                    parameter.mul_(1 - group["weight_decay"])
                parameter.add_(parameter.grad.sign(), alpha=-group["lr"])


def test_an_optimiser_that_goes_on_from_the_parameters_value_is_taken(monkeypatch, capsys):
    model = gaussian()
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    trained = [p for p in model.parameters() if p.requires_grad]
    KLStep(final_std=0.1).attach(model, MovingStart(trained, 0.1, 0.05), total_steps=STEPS)
    optimizer = MovingStart(trained)
    printed = capsys.readouterr().out
    KLStep(final_std=0.1, std_lr=0.0).attach(model, optimizer, total_steps=STEPS)
    assert not seeds  # a GPU's noise goes on as it was
    assert printed.count("weights decay") == 2  # by the two above
    assert not capsys.readouterr().out
    loop(model, optimizer, STEPS)
    assert mean_std(model) == pytest.approx(0.1, rel=0.05)


class SAM(torch.optim.Optimizer):
    """Steps with the gradients at a perturbed point; puts back what has a gradient there."""

    def __init__(self, params: Any, base_optimizer: type, **options: Any) -> None:
        super().__init__(params, {"rho": 0.05})
        self.base_optimizer = base_optimizer(self.param_groups, **options)

    @torch.no_grad()
    def first_step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["before"] = parameter.detach().clone()
                parameter.add_(parameter.grad, alpha=group["rho"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.first_step()
        with torch.enable_grad():
            closure()
        for parameter, state in self.state.items():
            if parameter.grad is not None:
                parameter.copy_(state["before"])
        self.base_optimizer.step()


def test_of_a_sharpness_aware_optimiser_the_one_inside_it_is_taken():
    model = gaussian()
    optimizer = SAM([p for p in model.parameters() if p.requires_grad], torch.optim.SGD, lr=0.0)
    step = KLStep(final_std=0.1, std_lr=0.0)
    with pytest.raises(Refusal, match=r"call attach\(model, optimizer.base_optimizer"):
        step.attach(model, optimizer, total_steps=STEPS)
    step.attach(model, optimizer.base_optimizer, total_steps=STEPS)
    for _ in range(STEPS):
        backward(model)
        optimizer.step(lambda: backward(model))
        optimizer.zero_grad()
    assert mean_std(model) == pytest.approx(0.1, rel=0.05)


def test_lora_with_a_frozen_a_is_refused_by_a_remedy_that_helps():
    model = gaussian()
    optimizer = create_lorafa_optimizer(model, r=8, lora_alpha=8, lr=1e-3)
    step = KLStep(final_std=0.1)
    with pytest.raises(Refusal, match=r"LoRA-FA freezes A.* call model.set_adapter"):
        step.attach(model, optimizer, total_steps=STEPS)
    with pytest.raises(Refusal, match=r"no standard deviation is trained.* call model.set_adapter"):
        step.attach(model, torch.optim.AdamW(model.parameters()), total_steps=STEPS)
    model.set_adapter("default")
    optimizer = sgd(model)
    step.attach(model, optimizer, total_steps=STEPS)
    loop(model, optimizer, STEPS)
    assert mean_std(model) == pytest.approx(0.1, rel=0.05)


def test_parameters_that_a_wrapper_has_flattened_are_refused():
    model = gaussian()
    optimizer = sgd(model)
    for layer in layers_of(model):
        layer.root_std.data = layer.root_std.data.flatten()[:5]
    with pytest.raises(Refusal, match=r"cut into flat pieces.*use FSDP 2"):
        KLStep().attach(model, optimizer, total_steps=3)


def test_two_processes_share_g_and_one_wrapped_too_early_is_refused():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    program = [sys.executable, "-W", "ignore", Path(__file__).parents[1] / "two_processes.py"]
    kinds = ["ddp", "wrapped before", "fsdp2"]
    started = [
        subprocess.Popen([*program, rank, port, *kinds], stdout=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    spoken = [process.communicate(timeout=300)[0].splitlines() for process in started]
    first, second = ([json.loads(line) for line in lines] for lines in spoken)
    for one, other in zip(first, second, strict=True):
        assert one == other
    ddp, wrapped_before, fsdp2 = first
    assert "made before bayesify, without root_std of ['" in wrapped_before["refused"]
    for run in (ddp, fsdp2):
        assert run["std"] == pytest.approx(0.1, rel=0.02)
    whole, sharded = fsdp2["kl"]
    assert sharded == pytest.approx(whole, rel=1e-6)


# Callbacks, data, adapters


def test_trackers_that_stand_before_it_see_the_kl(tmp_path):
    seen: list[set[str]] = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(set(logs))

    trainer(gaussian(), tmp_path, Tracker(), KLStep()).train()
    losses = [keys for keys in seen if "loss" in keys]
    assert len(losses) == 3
    assert all({"kl", "kl_time", "std_over_prior", "kl_weight", "kl_lr"} <= keys for keys in losses)


def test_a_stream_of_rows_needs_no_length(tmp_path):
    model = gaussian()
    trainer(model, tmp_path, KLStep(), rows=Stream()).train()
    assert mean_std(model) == pytest.approx(0.1, rel=0.01)
    with pytest.raises(Refusal, match="period is not known.*or final_std without bursts"):
        trainer(gaussian(), tmp_path, KLStep(kl_lr=0.01), rows=Stream()).train()


@pytest.mark.parametrize("name", ["b", "weight", "lora_A", "my-adapter"])
def test_the_gaussian_adapter_is_found_whatever_its_name(name):
    model = adapted(tiny_llama(num_hidden_layers=1))
    model.add_adapter(name, model.peft_config["default"])
    bayesify(model, adapter=name)
    model.train()
    model.set_adapter(name)
    optimizer = sgd(model)
    with pytest.raises(Refusal, match=f"deterministic adapter 'default'.*among .'{name}'"):
        KLStep(adapter="default").attach(model, optimizer, total_steps=9)
    KLStep().attach(model, optimizer, total_steps=9)
    loop(model, optimizer, 9)
    assert mean_std(model, name) == pytest.approx(0.1, rel=0.02)


def test_beside_an_active_plain_adapter_the_gaussian_one_is_meant():
    model = with_second(adapted(tiny_llama(num_hidden_layers=1))).train()
    bayesify(model, adapter="b")
    model.base_model.set_adapter(["default", "b"])
    optimizer = sgd(model)
    KLStep().attach(model, optimizer, total_steps=9)
    loop(model, optimizer, 9)
    assert mean_std(model, "b") == pytest.approx(0.1, rel=0.02)
    bayesify(model, adapter="default")
    with pytest.raises(Refusal, match=r"active Gaussian adapters \['default', 'b'\]"):
        KLStep().attach(model, optimizer, total_steps=9)


# Without a KL step


def test_a_gaussian_that_trains_without_a_kl_step_is_said_once(caplog):
    model = gaussian()
    loop(model, sgd(model), 25)
    assert caplog.text.count("20 training passes without a KL step") == 1
    caplog.clear()
    model = gaussian()
    optimizer = sgd(model)
    KLStep().attach(model, optimizer, total_steps=25)
    loop(model, optimizer, 25)
    model.eval()
    copy.deepcopy(model)
    assert "without a KL step" not in caplog.text


# Runs that are too short, and copies


@pytest.mark.parametrize("given", [{"final_std": 0.19}, {"kl_lr": 0.05, "period": 1}])
def test_steps_that_overshoot_the_prior_are_refused(given):
    model = gaussian()
    with pytest.raises(Refusal, match="a step of the KL is too long: got .* train for more steps"):
        KLStep(**given).attach(model, sgd(model), total_steps=3)


def test_a_copy_of_a_step_goes_on_where_the_run_is_once_it_is_attached():
    model = gaussian()
    optimizer = sgd(model)
    step = KLStep()
    step.attach(model, optimizer, total_steps=40)
    loop(model, optimizer, 20)
    twin, again = copy.deepcopy((model, step))
    assert again.step == 0  # an optimiser's copy has no hooks
    other = sgd(twin)
    again.attach(twin, other, total_steps=40, step=20)
    loop(model, optimizer, 20)
    loop(twin, other, 20)
    assert mean_std(model) == pytest.approx(0.1, rel=0.02)
    assert mean_std(twin) == pytest.approx(0.1, rel=0.02)


def test_a_copy_of_a_step_whose_run_is_over_begins_anew():
    step = KLStep()
    first = gaussian()
    optimizer = sgd(first)
    step.attach(first, optimizer, total_steps=40)
    loop(first, optimizer, 40)
    model = gaussian()
    optimizer = sgd(model)
    again = copy.deepcopy(step)
    again.attach(model, optimizer, total_steps=40)
    loop(model, optimizer, 40)
    assert mean_std(model) == pytest.approx(0.1, rel=0.02)
    assert again.state_of_kl()["kl_time"] == pytest.approx(step.state_of_kl()["kl_time"], rel=0.01)


@pytest.mark.parametrize("order", ["attached first", "loaded first"])
def test_a_loop_that_is_resumed_goes_on_at_its_step_in_either_order(order):
    model = gaussian()
    optimizer = sgd(model)
    step = KLStep()
    step.attach(model, optimizer, total_steps=40)
    loop(model, optimizer, 25)
    resumed = copy.deepcopy(model)
    other = sgd(resumed)
    own = KLStep()
    if order == "loaded first":
        own.load_state_dict(json.loads(json.dumps(step.state_dict())))
    own.attach(resumed, other, total_steps=40)
    if order == "attached first":  # as accelerate's load_state does
        own.load_state_dict(json.loads(json.dumps(step.state_dict())))
    assert own.step == 25
    loop(model, optimizer, 15)
    loop(resumed, other, 15)
    assert mean_std(resumed) == pytest.approx(mean_std(model), rel=1e-3)
    assert mean_std(resumed) == pytest.approx(0.1, rel=0.02)
    assert size(resumed) == pytest.approx(size(model), rel=1e-3)


def test_a_state_of_other_settings_is_refused_once_a_step_is_attached():
    model = gaussian()
    optimizer = sgd(model)
    step = KLStep()
    step.attach(model, optimizer, total_steps=40)
    state = step.state_dict()
    step.attach(model, optimizer, total_steps=50)
    with pytest.raises(Refusal, match=r"attached with other settings: got .*40.* expected .*50"):
        step.load_state_dict(state)
