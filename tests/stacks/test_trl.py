"""TRL's own trainers on a Gaussian adapter: what they are given, and what comes out."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers import LlamaForSequenceClassification

from bayestune import Gaussian, HeadLogits, KLStep, LastToken, bayesify, load_posterior, predict
from bayestune.adapters import GaussianLinear, Slots
from tiny import byte_level_tokenizer, tiny_llama

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.stacks

TEMPLATE = """{%- for m in messages %}{{ m['role'] }}: {% if m['role'] == 'assistant' %}
{%- generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}
{%- else %}{{ m['content'] }}{% endif %}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
TEXTS = ["the red apples", "the green tree grows tall and wide", "the sea", "the blue water"]
PAIRS = {
    "prompt": TEXTS * 4,
    "chosen": [text[::-1] for text in TEXTS] * 4,
    "rejected": [text[:3] * 4 for text in TEXTS] * 4,
}
FINAL = 0.1
README = Path(__file__).parents[2] / "README.md"


def texts() -> Dataset:
    return Dataset.from_dict({"text": TEXTS * 8})


def tokenizer() -> Any:
    made = byte_level_tokenizer()
    made.chat_template = TEMPLATE
    return made


def adapted(base: nn.Module | None = None, **config: Any) -> Any:
    lora = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **config}
    return get_peft_model(tiny_llama() if base is None else base, LoraConfig(**lora))


def gaussian(base: nn.Module | None = None, **config: Any) -> Any:
    model = adapted(base, **config)
    bayesify(model)
    return model


def settings(kind: Any, folder: Path, **changes: Any) -> Any:
    given: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "gradient_checkpointing": False,
    }
    return kind(**{**given, **changes})


def step() -> KLStep:
    return KLStep(prior_std=0.2, final_std=FINAL)


def layers_of(model: nn.Module) -> list[GaussianLinear]:
    return [module for module in model.modules() if isinstance(module, GaussianLinear)]


def assert_final(model: nn.Module) -> None:
    std = torch.cat([layer.std.flatten() for layer in layers_of(model)])
    assert_close(std.mean().item(), FINAL, rtol=0.05, atol=0.0)


def assert_loads(trainer: Any, folder: Path, base: nn.Module, batch: Any, scorer: Any) -> None:
    """What the trainer saves is the posterior: the same draws give the same probabilities."""
    trainer.save_model(str(folder / "saved"))
    trainer.model.eval()
    here = predict(Gaussian(trainer.model, scorer), batch, draws=3)
    loaded = predict(load_posterior(base, folder / "saved", scorer), batch, draws=3)
    assert_close(loaded.probabilities, here.probabilities, rtol=0, atol=1e-6)
    assert here.mutual_information.max() > 0


class Calls:
    """The calls of a model's first Gaussian layer, whose input at a token says nothing else.

    So two places that hold the same token give the same output if they see the same A.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layer = layers_of(model)[0]
        self.made: list[dict[str, Any]] = []
        self.layer.register_forward_hook(self._note)

    def _note(self, layer: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        mean = nn.functional.linear(args[0], layer.weight)
        self.made.append(
            {
                "output": output.detach(),
                "noise": (output - mean).detach(),
                "gradients": torch.is_grad_enabled(),
            }
        )

    def training(self) -> list[dict[str, Any]]:
        return [call for call in self.made if call["gradients"]]

    def others(self) -> list[dict[str, Any]]:
        return [call for call in self.made if not call["gradients"]]


def dpo(model: Any, folder: Path, **changes: Any) -> Any:
    extra = {name: changes.pop(name) for name in ("peft_config",) if name in changes}
    return trl.DPOTrainer(
        model,
        args=settings(trl.DPOConfig, folder, **changes),
        train_dataset=Dataset.from_dict(PAIRS),
        processing_class=tokenizer(),
        callbacks=[step()],
        **extra,
    )


def assert_pairs_share(calls: Calls) -> None:
    """All prompts begin with one token, which shows the draws."""
    assert calls.training()
    for call in calls.training():
        begins = call["output"][:, 0]
        assert len(begins) == 4
        assert torch.equal(begins[:2], begins[2:])
        assert not torch.allclose(begins[0], begins[1])


# Supervised


def test_the_two_lines_of_the_readme_in_the_real_sft_trainer(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    block = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[0]
    stock = "from transformers import Trainer"
    assert stock in block
    namespace = {
        "base": type(tiny_llama()).from_pretrained(tmp_path / "base"),
        "dataset": texts(),
        "arguments": settings(trl.SFTConfig, tmp_path),
    }
    block = block.replace(stock, "from trl import SFTTrainer as Trainer")
    exec(compile(block, "README.md", "exec"), namespace)
    trainer = namespace["trainer"]
    assert isinstance(trainer, trl.SFTTrainer)
    assert trainer.state.global_step == 6
    assert_final(trainer.model)
    batch = {"input_ids": torch.randint(3, 400, (3, 7))}
    assert_loads(trainer, tmp_path, tiny_llama(), batch, LastToken([11, 12]))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_assistant_only_loss_reaches_the_answers_alone(checkpointing, tmp_path):
    said = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}]
        for text in TEXTS * 4
    ]
    model = gaussian()
    calls = Calls(model)
    trainer = trl.SFTTrainer(
        model,
        settings(
            trl.SFTConfig,
            tmp_path,
            assistant_only_loss=True,
            gradient_checkpointing=checkpointing,
        ),
        train_dataset=Dataset.from_dict({"messages": said}),
        processing_class=tokenizer(),
        callbacks=[step()],
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert 0 < (batch["labels"] != -100).sum() < batch["labels"].numel() / 2
    trainer.train()
    assert_final(model)
    noise = calls.training()[0]["noise"]
    assert noise.any(-1).any(-1).all()


def test_each_document_of_a_packed_batch_sees_a_draw_of_its_own(tmp_path):
    model = gaussian()
    calls = Calls(model)
    seen: list[dict[str, Any]] = []
    model.register_forward_pre_hook(lambda _, args, given: seen.append(given), with_kwargs=True)
    documents = Dataset.from_dict({"text": ["the apple", "the sea is wide", "the", "the tree"] * 8})
    trainer = trl.SFTTrainer(
        model,
        settings(trl.SFTConfig, tmp_path, packing=True, max_length=48),
        train_dataset=documents,
        processing_class=tokenizer(),
        callbacks=[step()],
    )
    trainer.train()
    assert_final(model)
    for given, call in zip(seen, calls.training(), strict=True):
        ids = given["input_ids"][0]
        document = (given["position_ids"][0] == 0).cumsum(0)
        same = (ids[:, None] == ids) & ~torch.eye(len(ids), dtype=torch.bool)
        within = document[:, None] == document
        output = call["output"][0]
        alike = torch.isclose(output[:, None], output, rtol=1e-4, atol=1e-6).all(-1)
        assert document[-1] > 1
        assert alike[same & within].all()
        assert not alike[same & ~within].any()


def test_an_adapter_that_the_trainer_makes_is_converted_before_training(tmp_path):
    trainer = trl.SFTTrainer(
        tiny_llama(),
        settings(trl.SFTConfig, tmp_path),
        train_dataset=texts(),
        processing_class=tokenizer(),
        peft_config=LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        callbacks=[step()],
    )
    bayesify(trainer.model)
    trainer.train()
    assert_final(trainer.model)


# Preferences


@pytest.mark.parametrize("converted", ["before", "after", "peft_config"])
def test_both_sides_of_a_preference_see_one_draw_and_the_reference_none(converted, tmp_path):
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    if converted == "before":
        trainer = dpo(gaussian(), tmp_path)
    elif converted == "after":
        trainer = dpo(adapted(), tmp_path)
    else:
        trainer = dpo(tiny_llama(), tmp_path, peft_config=lora)
    model = trainer.model
    if converted != "before":
        bayesify(model)
    calls = Calls(model)
    trainer.train()
    assert_final(model)
    assert_pairs_share(calls)
    assert not calls.others()  # the reference does not call the Gaussian layers
    assert_loads(
        trainer,
        tmp_path,
        tiny_llama(),
        {"input_ids": torch.randint(3, 400, (3, 7))},
        LastToken([11, 12]),
    )


def test_the_reference_of_a_trained_adapter_is_its_mean_and_stays_so(tmp_path):
    model = gaussian()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    start = {name: weight.clone() for name, weight in Slots(model).weights().items()}
    trainer = dpo(model, tmp_path)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    model.eval()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    told = logits.gather(-1, ids[:, 1:, None])[..., 0]
    expected = (told * batch["completion_mask"][:, 1:]).sum(1).chunk(2)
    model.train()
    assert_close(trainer.compute_ref_log_probs(model, batch), expected, rtol=1e-4, atol=1e-4)
    trainer.train()
    reference = Slots(model, "ref")
    assert not reference.of_kind(GaussianLinear)
    assert_close(reference.weights(), start, rtol=0, atol=0)
    moved = Slots(model, "default").weights()
    assert all(not torch.equal(moved[name], weight) for name, weight in start.items())


def test_a_preference_run_that_is_resumed_ends_as_the_whole_run(tmp_path):
    torch.manual_seed(0)
    whole = dpo(gaussian(), tmp_path, save_strategy="steps", save_steps=3)
    whole.train()
    torch.manual_seed(1)
    resumed = dpo(gaussian(), tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert_close(Slots(resumed.model).weights(), Slots(whole.model).weights())
    for here, there in zip(layers_of(resumed.model), layers_of(whole.model), strict=True):
        assert_close(here.root_std, there.root_std)


def test_a_reward_model_compares_both_sides_under_one_draw(tmp_path):
    config = tiny_llama().config
    config.num_labels = 1
    config.pad_token_id = tokenizer().pad_token_id
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(config)
    state = {name: value.clone() for name, value in base.state_dict().items()}
    model = gaussian(base, task_type="SEQ_CLS")
    calls = Calls(model)
    sides = {
        "chosen": [f"the {text}" for text in PAIRS["chosen"]],
        "rejected": [f"the {text}" for text in PAIRS["rejected"]],
    }
    trainer = trl.RewardTrainer(
        model,
        settings(trl.RewardConfig, tmp_path),
        train_dataset=Dataset.from_dict(sides),
        processing_class=tokenizer(),
        callbacks=[step()],
    )
    trainer.train()
    assert_final(model)
    assert_pairs_share(calls)
    trainer.save_model(str(tmp_path / "saved"))
    model.eval()
    rows = {"input_ids": torch.randint(3, 400, (3, 7))}
    here = predict(Gaussian(model, HeadLogits()), rows, draws=3, likelihood="reward")
    fresh = LlamaForSequenceClassification(config)
    fresh.load_state_dict(state)
    posterior = load_posterior(fresh, tmp_path / "saved", HeadLogits())
    there = predict(posterior, rows, draws=3, likelihood="reward")
    assert_close(there.mean, here.mean)
    assert_close(there.std, here.std)


def test_unpaired_preferences_are_rows_of_their_own(tmp_path):
    model = gaussian()
    calls = Calls(model)
    trainer = trl.KTOTrainer(
        model,
        args=settings(trl.KTOConfig, tmp_path),
        train_dataset=Dataset.from_dict(
            {
                "prompt": PAIRS["prompt"],
                "completion": PAIRS["chosen"],
                "label": [True, False] * 8,
            }
        ),
        processing_class=tokenizer(),
        callbacks=[step()],
    )
    trainer.train()
    assert_final(model)
    begins = calls.training()[0]["output"][:, 0]
    assert not torch.allclose(begins[0], begins[1])
    assert all(not call["noise"].any() for call in calls.others())


# Reinforcement


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("GRPO", {"beta": 0.0}),
        ("GRPO", {"beta": 0.1}),
        ("GRPO", {"beta": 0.1, "num_iterations": 2}),
        ("RLOO", {"beta": 0.1}),
    ],
)
def test_texts_are_sampled_and_scored_at_the_mean_and_learnt_from_under_draws(
    kind, changes, tmp_path
):
    model = gaussian()
    calls = Calls(model)
    config = settings(
        getattr(trl, f"{kind}Config"),
        tmp_path,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=6,
        **changes,
    )
    trainer = getattr(trl, f"{kind}Trainer")(
        model,
        lambda completions, **_: [float(len(text)) for text in completions],
        args=config,
        train_dataset=Dataset.from_dict({"prompt": PAIRS["prompt"]}),
        processing_class=tokenizer(),
        callbacks=[step()],
    )
    trainer.train()
    assert_final(model)
    assert calls.others()
    assert all(not call["noise"].any() for call in calls.others())
    for call in calls.training():
        assert call["noise"].any(-1).any(-1).all()
    log = trainer.state.log_history[0]
    assert log["std_over_prior"] > 0
    if changes["beta"]:
        assert log["kl"] < 100 < log["posterior_kl"]  # the policy's is the trainer's own


def test_the_example_runs(tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    place = README.parent / "examples" / "trl_sft.py"
    spec = importlib.util.spec_from_file_location("example_trl_sft", place)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(["--model", str(tmp_path / "base"), "--steps", "4", "--draws", "3"])
    assert "nats of disagreement" in capsys.readouterr().out
