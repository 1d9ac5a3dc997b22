"""The task step's reference points, and the choices, at tiny sizes."""

import pytest
import torch
from torch.nn import functional as F

import subjects
from bayestune.adapters import GaussianLinear, Slots
from bayestune.kl import KLStep
from bayestune.kl.closed_form import kl_step_
from bayestune.runtime import keep_freed_memory
from studies import choices, published, published_step
from studies.official import OfficialStep, official_class
from studies.tests.checkout import write_checkout

PERIOD = 3
STEPS = 12


def names_of(record):
    return [case["name"] for case in record["cases"]]


# Choices


def test_attention(run):
    sizes = "--layers 2 --hidden 32 --intermediate 64 --heads 4 --kv_heads 2 --vocab 128 --rows 2"
    lengths = ["--lengths", 8, 16, "--precisions", "fp32"]
    record = run(choices, "attention", *sizes.split(), *lengths)
    assert names_of(record) == ["2×8 tokens, fp32", "2×16 tokens, fp32"]
    assert record["benchmark"] == "attention"


@pytest.mark.skipif(not keep_freed_memory(False), reason="another C library")
def test_allocator(run, real):
    record = run(choices, "allocator", *real, "--precisions", "fp32", "--draws", 2)
    assert names_of(record) == ["task step, fp32", "2 draws, fp32"]


def test_text_step(run, real):
    record = run(choices, "text_step", *real, "--precisions", "fp32")
    lines = ("BLoB training step", "mean's pass")
    assert names_of(record) == [f"{line}, packed / expanded, fp32" for line in lines]
    assert float(record["title"].rpartition("at most ")[2].split()[0]) < 1e-5


def test_a_choice_that_needs_a_model_says_so(capsys):
    with pytest.raises(SystemExit):
        choices.main(["text_step"])
    assert "nothing to measure text_step on: give --model" in capsys.readouterr().err


# The published form


@pytest.fixture
def loss():
    torch.manual_seed(5)
    ids = torch.randint(3, 400, (3, 7))
    labels = torch.tensor([0, 3, 1])

    def loss(model, turn):
        logits = model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits[:, -1, 10:14], labels)

    return loss


def adapted(model, name):
    """With B away from 0, or no noise would reach the loss."""
    model = subjects.adapt(model, name, 4)
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "root_std" not in name:
            parameter.data.normal_(0, 0.3)
    return model


@pytest.fixture
def step(llama, loss):
    """A published step, large enough to see."""
    model = adapted(llama(), "lora")
    layers = published.publish(model, init_root_std=0.5)
    plan = published.Plan(kl_lr=0.02, period=PERIOD, total_steps=STEPS)
    return published.PublishedStep(model, layers, loss, "fp32", plan)


def test_the_published_step_takes_the_updates_of_ours(llama, loss, step):
    ours = adapted(llama(), "token")
    slots = list(Slots(ours).of_kind(GaussianLinear).values())
    for slot, layer in zip(slots, step.layers, strict=True):
        slot.root_std.data.copy_(layer.root_std)
    start = [slot.root_std.detach().clone() for slot in slots]
    trained = [parameter for parameter in ours.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, eps=1e-6, weight_decay=0.0)
    KLStep(kl_lr=0.02, period=PERIOD).attach(ours, optimizer, total_steps=STEPS)
    mine = subjects.TrainingStep(ours, optimizer, loss, torch.device("cpu"), "fp32")
    for turn in range(STEPS - 1):
        for one in (step, mine):
            torch.manual_seed(turn)
            one(turn)
    theirs = dict(step.model.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            other = theirs[name.replace("lora_A.default.root_std", "root_std")]
            torch.testing.assert_close(other, parameter, atol=2e-6, rtol=1e-5)
    for slot, before in zip(slots, start, strict=True):
        assert (slot.root_std - before).abs().mean() > 1e-3


def slot_of(layer):
    return layer.lora_A["default"].weight.detach(), layer.root_std.detach()


def copy_of(layer):
    return tuple(part.clone() for part in slot_of(layer))


def test_without_noise_the_published_kl_is_our_kl_step(step, monkeypatch):
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    step.likelihood.optimizer.param_groups[0]["lr"] = 0.0
    means, roots = map(list, zip(*map(copy_of, step.layers), strict=True))
    step.step = 4  # warm, and in the middle of a period
    step(0)
    size = float(step.rates[4] * step.weights[4])
    assert size > 1e-3
    kl_step_(means, roots, size, step.plan.prior_std)
    for layer, mean, root in zip(step.layers, means, roots, strict=True):
        torch.testing.assert_close(slot_of(layer), (mean, root), atol=1e-7, rtol=1e-6)


def test_the_published_noise_has_its_variance_and_differs_from_token_to_token(step):
    layer = step.layers[0]
    seen = torch.ones(1, 4000, 32)
    with torch.no_grad():
        layer.lora_A["default"].weight.zero_()
        noise = (layer(seen) - layer.base_layer(seen))[0]
        weight = layer.scaling["default"] * layer.lora_B["default"].weight
        expected = (weight.square() @ layer.root_std.pow(4).sum(1)).sum().item()
    # over tokens alone, E held: r·k entries leave the variance a spread of about sqrt(2/(r·k))
    assert noise.var(0).sum() == pytest.approx(expected, rel=0.5)
    assert torch.corrcoef(noise)[0, 1:].mean().abs() < 0.1


@pytest.fixture
def prompts(llama, byte_level, tiny_task):
    scorer = subjects.LetterScorer(byte_level, tiny_task)
    starts = (0, 2)
    batches = [scorer.collate(scorer.encode(tiny_task.train[i : i + 2])) for i in starts]
    return subjects.Prompts(llama(), scorer, batches)


def test_the_published_step_computes_all_logits_and_uses_the_answers(prompts):
    lengths = []
    head = prompts.model.get_output_embeddings()
    head.register_forward_hook(lambda _, inputs, out: lengths.append(out.shape[1]))
    full = published.answer_loss(prompts)(prompts.model, 0)
    last = subjects.task_loss(prompts)(prompts.model, 0)
    torch.testing.assert_close(full, last, atol=1e-6, rtol=1e-6)
    assert lengths == [prompts.batch(0)["input_ids"].shape[1], 1]


# The authors' code


@pytest.fixture
def checkout(tmp_path, imports_undone):
    return write_checkout(tmp_path / "checkout")


def test_published_step(run, real, checkout):
    names = ["published form, ours with the attention it trains with", "published form"]
    plain = run(published_step, *real, "--precisions", "fp32")
    assert names_of(plain) == [f"BLoB task step / {name}, fp32" for name in names]
    names.append("the authors' code")
    record = run(published_step, *real, "--official", checkout)
    lines = [(precision, name) for precision in ("fp32", "bf16") for name in names]
    assert names_of(record) == [f"BLoB task step / {name}, {kind}" for kind, name in lines]


def test_the_authors_class_takes_its_own_steps(prompts, checkout):
    step = OfficialStep(official_class(checkout), prompts.model, prompts, 4, "bf16")
    assert step.wrapper.training
    for turn in range(3):
        step(turn)
    shapes = [batch["input_ids"].shape for batch in prompts.batches]
    labels = [batch["labels"].tolist() for batch in prompts.batches]
    expected = [(shapes[i], labels[i], torch.float32, True) for i in (0, 1, 0)]
    assert step.wrapper.seen == expected
    trained = dict(step.wrapper.named_parameters())
    assert all(trained[name].grad is not None for name in trained if "lora_B" in name)
    assert not list(checkout.rglob("__pycache__"))


def test_a_folder_that_is_not_a_checkout_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"which has no modelwrappers/blob.py, expected a chec"):
        official_class(tmp_path)
