"""The task step's reference points: the published form takes our updates, the authors' class is driven as it is."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from bayestune.adapters import gaussian_layers
from bayestune.kl import KLStep
from bayestune.kl.closed_form import kl_step_
from checkout import write_checkout

FOLDER = Path(__file__).parents[1] / "benchmarks"
ROWS, LENGTH, PERIOD, STEPS = 3, 7, 3, 12


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.fixture
def loss():
    torch.manual_seed(5)
    ids = torch.randint(3, 400, (ROWS, LENGTH))

    def loss(model, turn):
        return F.cross_entropy(
            model(input_ids=ids, use_cache=False).logits[:, -1, 10:14], torch.tensor([0, 3, 1])
        )

    return loss


def randomised(model):
    """B away from 0, or no noise would reach the loss."""
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "root_std" not in name:
            parameter.data.normal_(0, 0.3)
    return model


@pytest.fixture
def published(load, llama, loss):
    """A published step, large enough to see, and its layers."""
    module = load("published")
    model = randomised(load("subjects").adapt(llama(), "lora", 4))
    layers = module.publish(model, init_root_std=0.5)
    step = module.published_step(
        model, layers, loss, "fp32", kl_lr=0.02, period=PERIOD, total_steps=STEPS
    )
    return step, layers


def test_the_published_step_takes_the_updates_of_ours(load, llama, loss, published):
    step, layers = published
    ours = randomised(load("subjects").adapt(llama(), "token", 4))
    slots = list(gaussian_layers(ours).values())
    for slot, layer in zip(slots, layers, strict=True):
        slot.root_std.data.copy_(layer.root_std)
    start = [slot.root_std.detach().clone() for slot in slots]
    others = [p for n, p in ours.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(others, lr=1e-4, eps=1e-6, weight_decay=0.0)
    KLStep(kl_lr=0.02, period=PERIOD).attach(ours, optimizer, total_steps=STEPS)
    mine = load("subjects").TrainingStep(ours, optimizer, loss, torch.device("cpu"), "fp32")
    for turn in range(STEPS - 1):
        for one in (step, mine):
            torch.manual_seed(turn)
            one(turn)
    theirs = {
        name.replace("root_std", "lora_A.default.root_std"): p
        for name, p in step.model.named_parameters()
    }
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(theirs[name], parameter, atol=2e-6, rtol=1e-5)
    assert (
        min(
            (slot.root_std - before).abs().mean() for slot, before in zip(slots, start, strict=True)
        )
        > 1e-3
    )


def test_without_noise_the_published_kl_is_our_kl_step(load, published, monkeypatch):
    step, layers = published
    monkeypatch.setattr(load("published").torch, "randn_like", torch.zeros_like)
    step.likelihood.param_groups[0]["lr"] = 0.0
    means, stds = (
        [p.detach().clone() for p in part] for part in zip(*map(slot_of, layers), strict=True)
    )
    step.step = 4  # warm, and in the middle of a period
    step(0)
    kl_step_(means, stds, float(step.rates[4] * step.weights[4]), step.prior_std)
    for layer, mean, std in zip(layers, means, stds, strict=True):
        torch.testing.assert_close(slot_of(layer), (mean, std), atol=1e-7, rtol=1e-6)
    assert float(step.rates[4] * step.weights[4]) > 1e-3


def slot_of(layer):
    return layer.lora_A["default"].weight.detach(), layer.root_std.detach()


def test_the_published_noise_carries_the_likelihood_s_gradient_and_differs_from_token_to_token(
    load, llama, published
):
    step, layers = published
    torch.manual_seed(0)
    step.loss(step.model, 0).backward()
    assert min(layer.root_std.grad.abs().max() for layer in layers) > 1e-6
    layer, seen = layers[0], torch.ones(1, 4000, 32)
    with torch.no_grad():
        layer.lora_A["default"].weight.zero_()
        noise = (layer(seen) - layer.base_layer(seen))[0]
        expected = (
            layer.scaling["default"] ** 2
            * layer.lora_B["default"].weight.square()
            @ (layer.root_std.pow(4).sum(1))
        )
    # over tokens alone, E held: its r·k entries leave a spread of the variance of about sqrt(2/(r·k))
    assert noise.var(0).sum() == pytest.approx(expected.sum().item(), rel=0.5)
    correlation = torch.corrcoef(noise)[0, 1:].mean().abs()
    assert correlation < 0.1


def test_the_published_step_computes_all_logits_and_uses_the_answers(
    load, llama, byte_level, tiny_task
):
    published, subjects = load("published"), load("subjects")
    scorer = subjects.LetterScorer(byte_level, tiny_task)
    batch, model, shapes = scorer.collate(scorer.encode(tiny_task.train[:4])), llama(), []
    prompts = subjects.Prompts(model, scorer, [batch])
    model.get_output_embeddings().register_forward_hook(
        lambda _, inputs, out: shapes.append(out.shape)
    )
    full, last = published.answer_loss(prompts)(model, 0), subjects.task_loss(prompts)(model, 0)
    torch.testing.assert_close(full, last, atol=1e-6, rtol=1e-6)
    assert [shape[1] for shape in shapes] == [batch["input_ids"].shape[1], 1]


# The authors' code


@pytest.fixture
def checkout(tmp_path):
    return write_checkout(tmp_path / "checkout")


def test_the_authors_class_takes_its_own_steps(load, llama, byte_level, tiny_task, checkout):
    official, subjects = load("official"), load("subjects")
    scorer, model = subjects.LetterScorer(byte_level, tiny_task), llama()
    batches = [scorer.collate(scorer.encode(tiny_task.train[i : i + 2])) for i in (0, 2)]
    cls = official.official_class(checkout)
    step = official.official_step(cls, model, subjects.Prompts(model, scorer, batches), 4, "bf16")
    assert step.wrapper.training
    for turn in range(3):
        step(turn)
    shapes = [batch["input_ids"].shape for batch in batches]
    labels = [batch["labels"].tolist() for batch in batches]
    assert step.wrapper.seen == [(shapes[i], labels[i], torch.float32, True) for i in (0, 1, 0)]
    assert all(p.grad is not None for n, p in step.wrapper.named_parameters() if "lora_B" in n)


def test_nothing_of_the_authors_code_stays_behind(load, checkout, monkeypatch):
    official = load("official")
    mine = type(sys)("utils")
    monkeypatch.setitem(sys.modules, "utils", mine)
    before, path = set(sys.modules), list(sys.path)
    official.official_class(checkout)
    assert sys.modules["utils"] is mine
    assert {
        name for name in set(sys.modules) - before if name.split(".")[0] in official.ROOMS
    } == set()
    assert all(
        sys.modules[name].__spec__ is not None for name in official.ABSENT if name in sys.modules
    )
    assert sys.path == path
    assert not list(checkout.rglob("__pycache__"))


def test_a_folder_that_is_no_checkout_is_refused(load, tmp_path, checkout):
    official = load("official")
    with pytest.raises(
        ValueError,
        match="got .*, which has no modelwrappers/blob.py, expected a checkout; clone https",
    ):
        official.official_class(tmp_path)
    (checkout / "modelwrappers/blob.py").write_text("class BLoB:\n    pass\n", encoding="utf-8")
    with pytest.raises(
        ValueError, match="blob.py has no class BLoB that fits, expected one; clone https"
    ):
        official.official_class(checkout)
    (checkout / "modelwrappers/blob.py").write_text("import not_there_at_all\n", encoding="utf-8")
    with pytest.raises(
        ImportError,
        match="cannot be imported: got .*not_there_at_all.*expected what it needs.*install",
    ):
        official.official_class(checkout)
    assert not any(name.split(".")[0] in official.ROOMS for name in sys.modules)
