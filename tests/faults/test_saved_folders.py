"""A saved folder gives back what was fitted, by every option and every way to save, or refuses."""

import copy
import json
import pickle
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers.integrations.peft
from packaging.version import Version
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    Qwen2Config,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from bayestune import (
    Draws,
    Gaussian,
    KLStep,
    Mixture,
    Point,
    bayesify,
    export_draw,
    load_posterior,
    save_posterior,
)
from bayestune.adapters import GaussianLinear, Slots, frozen_samples
from bayestune.adapters.base_samples import base_samples
from bayestune.posteriors import (
    DETAILS,
    Posterior,
    PosteriorError,
    load_adapter,
    load_members,
    read_details,
)
from tiny import BATCH, GPT2, WIDE, causal, end_logits, tiny_bert, tiny_llama

QV = ["q_proj", "v_proj"]
Make = Callable[[], nn.Module]


def fitted(base: nn.Module, name: str = "default", seed: int = 3, **lora: Any) -> PeftModel:
    """A converted model all of whose trainable numbers have moved."""
    config = {"r": 4, "target_modules": QV, "task_type": "CAUSAL_LM", **lora}
    model = get_peft_model(base, LoraConfig(**config), name)
    bayesify(model)
    return moved(model, seed)


def moved(model: PeftModel, seed: int = 3) -> PeftModel:
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "root_std" in name:
                parameter.uniform_(0.2, 0.4)
            elif parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def classes(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits


def scorer_of(model: nn.Module) -> Any:
    return (
        end_logits if hasattr(model.config, "tie_word_embeddings") and _speaks(model) else classes
    )


def _speaks(model: nn.Module) -> bool:
    return model.get_output_embeddings() is not None


def qwen2() -> nn.Module:
    return causal(Qwen2Config(**WIDE))


def tied() -> nn.Module:
    return causal(LlamaConfig(**WIDE, tie_word_embeddings=True))


def distilbert() -> nn.Module:
    torch.manual_seed(int(torch.randint(1000, ())))  # its head is another each time
    config = DistilBertConfig(vocab_size=400, dim=32, hidden_dim=64, n_layers=2, n_heads=2)
    model = DistilBertForSequenceClassification(config)
    torch.manual_seed(0)
    for parameter in model.distilbert.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


PATHS = {"model.layers.0.self_attn.q_proj": 2}
OPTIONS: dict[str, tuple[Make, dict[str, Any]]] = {
    "lora_bias": (tiny_llama, {"lora_bias": True}),
    "bias all": (qwen2, {"bias": "all"}),
    "bias lora_only": (qwen2, {"bias": "lora_only"}),
    "bias all, gpt2": (lambda: causal(GPT2), {"bias": "all", "target_modules": ["c_attn"]}),
    "rsLoRA": (tiny_llama, {"use_rslora": True, "lora_alpha": 3}),
    "ranks": (tiny_llama, {"rank_pattern": PATHS, "use_rslora": True}),
    "alphas": (tiny_llama, {"alpha_pattern": {"v_proj": 40}}),
    "token indices": (tiny_llama, {"trainable_token_indices": [5, 7]}),
    "token indices, tied": (tied, {"trainable_token_indices": {"embed_tokens": [5, 7]}}),
    "norms": (tiny_llama, {"modules_to_save": ["norm"]}),
    "embeddings": (tiny_llama, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "embeddings, tied": (tied, {"modules_to_save": ["embed_tokens"]}),
    "tied head": (tied, {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
    "head adapted": (tiny_llama, {"target_modules": [*QV, "lm_head"]}),
    "all linear": (tiny_llama, {"target_modules": "all-linear"}),
    "expression": (tiny_llama, {"target_modules": r".*\.1\..*proj"}),
    "some layers": (tiny_llama, {"layers_to_transform": [1]}),
    "excluded": (tiny_llama, {"exclude_modules": ["model.layers.0.self_attn.q_proj"]}),
    "replicated": (tiny_llama, {"layer_replication": [[0, 2], [1, 2]]}),
    "moved layers": (tiny_llama, {"layer_replication": [[0, 1], [0, 2]]}),
    "gaussian": (tiny_llama, {"init_lora_weights": "gaussian"}),
    "random B": (tiny_llama, {"init_lora_weights": False}),
    "orthogonal": (tiny_llama, {"init_lora_weights": "orthogonal"}),
    "eva": (tiny_llama, {"init_lora_weights": "eva"}),
    "dropout": (tiny_llama, {"lora_dropout": 0.3}),
    "a trained head": (tiny_bert, {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "a random head": (distilbert, {"target_modules": ["q_lin"], "task_type": "SEQ_CLS"}),
    "no task": (tiny_llama, {"task_type": None}),
}
if Version(peft.__version__) < Version("0.19"):
    OPTIONS.pop("tied head")  # PEFT itself cannot make it there


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("way", ["save_posterior", "save_pretrained"])
def test_every_option_comes_back(option, way, tmp_path):
    make, lora = OPTIONS[option]
    base = make()
    ask = scorer_of(base)
    posterior = Gaussian(fitted(base, **lora), ask)
    if way == "save_posterior":
        save_posterior(posterior, tmp_path)
    else:
        posterior.model.save_pretrained(tmp_path)
    expected = [posterior.logits(BATCH, Draws(count)) for count in (0, 3)]
    loaded = load_posterior(make(), str(tmp_path), ask)
    assert loaded.kind == "gaussian"
    again = save_posterior(loaded, tmp_path / "again")
    for one in (loaded, load_posterior(make(), again, ask)):
        got = [one.logits(BATCH, Draws(count)) for count in (0, 3)]
        assert_close(got, expected, rtol=0, atol=1e-6)
    assert (expected[1].std(0) > 1e-5).any()


@pytest.mark.parametrize("where", ["trained", "frozen after"])
def test_weights_of_the_base_that_are_trained_come_back(where, tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=QV))
    bayesify(model)
    for name, parameter in model.named_parameters():
        if "layernorm" in name or name.endswith("embed_tokens.weight"):
            parameter.requires_grad_(True)
    posterior = Gaussian(moved(model), end_logits)
    save_posterior(posterior, tmp_path / "once")
    if where == "frozen after":
        posterior = load_posterior(tiny_llama(), tmp_path / "once", end_logits)
        posterior.model.save_pretrained(tmp_path / "once")
    loaded = load_posterior(tiny_llama(), tmp_path / "once", end_logits)
    assert torch.equal(loaded.logits(BATCH, Draws(2)), posterior.logits(BATCH, Draws(2)))
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "once").eval()
    assert_close(end_logits(plain, BATCH), posterior.logits(BATCH, Draws(0))[0])


def test_running_statistics_come_back(tmp_path):
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))

    def ask(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["x"])

    rows = {"x": torch.randn(8, 4, generator=torch.Generator().manual_seed(0))}
    model = fitted(make(), target_modules=["0", "3"], task_type=None)
    model.train()
    model(rows["x"])
    posterior = Gaussian(model.eval(), ask)
    loaded = load_posterior(make(), save_posterior(posterior, tmp_path), ask)
    assert_close(loaded.logits(rows, Draws(3)), posterior.logits(rows, Draws(3)))


RESIZED: dict[str, tuple[Make, bool, dict[str, Any]]] = {
    "plain": (tiny_llama, True, {}),
    "a base without a name": (tiny_llama, False, {}),
    "tied": (tied, True, {}),
    "tokens": (tied, False, {"trainable_token_indices": [401]}),
    "all linear": (tiny_llama, True, {"target_modules": "all-linear"}),
    "trained": (tiny_llama, True, {"modules_to_save": ["embed_tokens", "lm_head"]}),
}


@pytest.mark.parametrize("case", RESIZED)
def test_a_resized_vocabulary_comes_back_also_on_the_base_as_it_was(case, tmp_path):
    make, named, lora = RESIZED[case]
    make().save_pretrained(tmp_path / "base")

    def base() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base") if named else make()

    resized = base()
    resized.resize_token_embeddings(410, mean_resizing=False)
    batch = {"input_ids": torch.tensor([[5, 401, 7, 403, 409]])}
    posterior = Gaussian(fitted(resized, **lora), end_logits)
    expected = posterior.logits(batch, Draws(3))
    again = base()
    again.resize_token_embeddings(410, mean_resizing=False)  # its new rows are others
    for folder in ("own", "ours"):
        if folder == "own":
            posterior.model.save_pretrained(tmp_path / folder)
        else:
            save_posterior(posterior, tmp_path / folder)
        loaded = load_posterior(base(), tmp_path / folder, end_logits)
        assert_close(loaded.logits(batch, Draws(3)), expected, rtol=0, atol=1e-6)
    loaded = load_posterior(again, tmp_path / "own", end_logits)
    assert_close(loaded.logits(batch, Draws(3)), expected, rtol=0, atol=1e-6)


# A Trainer's folders


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = (torch.arange(8) * 7 + 3 * index) % 390 + 3
        return {"input_ids": ids, "labels": ids}


class StopsAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def trained(
    folder: Path, stop: int = 6, resume: bool = False, name: str = "default", **arguments: Any
) -> Trainer:
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=QV), name)
    torch.manual_seed(1)
    bayesify(model, init_root_std=0.5)
    given = {"output_dir": str(folder), "max_steps": 6, "save_steps": 3, "seed": 4}
    given |= {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": []}
    given |= {"disable_tqdm": True, "use_cpu": True, "lr_scheduler_type": "constant"}
    step = KLStep(prior_std=0.2, kl_lr=0.01, schedule="constant", warmup_ratio=0.0)
    arguments = TrainingArguments(**{**given, **arguments})
    data = {"train_dataset": Rows(), "eval_dataset": Rows()}
    trainer = Trainer(model, arguments, callbacks=[step, StopsAt(stop)], **data)  # type: ignore[arg-type]
    trainer.train(resume_from_checkpoint=resume or None)
    model.eval()
    return trainer


def same(loaded: Posterior, model: nn.Module) -> None:
    posterior = Gaussian(model, end_logits)
    expected = posterior.logits(BATCH, Draws(3))
    assert (expected.std(0) > 1e-4).any()
    assert torch.equal(loaded.on(end_logits).logits(BATCH, Draws(3)), expected)


def test_what_a_trainer_saves_is_a_posterior_and_a_stock_adapter(tmp_path):
    trainer = trained(tmp_path)
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-6"):
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            assert not [name for name in file.keys() if "root_std" in name]  # noqa: SIM118
        same(load_posterior(tiny_llama(), folder), trainer.model)
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert torch.equal(end_logits(plain, BATCH), end_logits(trainer.model, BATCH))


@pytest.mark.parametrize("name", ["default", "mine"])
def test_a_resumed_run_is_the_whole_one(name, tmp_path):
    whole = trained(tmp_path / "whole", 6, name=name)
    trained(tmp_path / "parts", 3, name=name)
    resumed = trained(tmp_path / "parts", 6, resume=True, name=name)
    after = resumed.model.state_dict()
    for key, value in whole.model.state_dict().items():
        assert torch.equal(after[key], value), key


def test_the_best_checkpoint_comes_back_with_its_standard_deviations(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 3, "metric_for_best_model": "loss"}
    options |= {"load_best_model_at_end": True, "greater_is_better": True}
    trainer = trained(tmp_path, **options)
    best = Path(str(trainer.state.best_model_checkpoint))
    assert best.name == "checkpoint-3"
    same(load_posterior(tiny_llama(), best), trainer.model)


def test_adapters_of_other_names_are_saved_each_in_its_folder(tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=QV), "mine")
    model.add_adapter("other", LoraConfig(r=2, target_modules=QV))
    bayesify(model)
    moved(model).save_pretrained(tmp_path, selected_adapters=["mine"])
    same(load_posterior(tiny_llama(), tmp_path), model)  # the only one in it
    model.save_pretrained(tmp_path)
    same(load_posterior(tiny_llama(), tmp_path / "mine"), model)
    assert not (tmp_path / "other" / DETAILS).exists()
    with pytest.raises(PosteriorError, match=r"got a folder of the adapters \['mine', 'other'\]"):
        load_posterior(tiny_llama(), tmp_path)


def test_pickled_weights_and_a_state_that_is_given_are_saved(tmp_path):
    model = fitted(tiny_llama())
    model.save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert not (tmp_path / "bin/adapter_model.safetensors").exists()
    same(load_posterior(tiny_llama(), tmp_path / "bin"), model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = copy.deepcopy(model)
    moved(model, seed=8)
    model.save_pretrained(str(tmp_path / "given"), state_dict=state)
    same(load_posterior(tiny_llama(), tmp_path / "given"), expected)
    model.save_pretrained(tmp_path / "other process", is_main_process=False)
    assert not (tmp_path / "other process" / DETAILS).exists()


def test_what_goes_to_the_hub_is_a_posterior(monkeypatch, tmp_path):
    model = fitted(tiny_llama())
    uploaded = []
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *a, **k: Card())
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *a, **k: Card())

    def upload(self: nn.Module, folder: str, *_: Any, **__: Any) -> None:
        same(load_posterior(tiny_llama(), folder), self)
        uploaded.append(folder)

    monkeypatch.setattr(PeftModel, "_upload_modified_files", upload)
    model.push_to_hub("someone/something")
    assert uploaded


class Card:
    repo_id = "someone/something"

    def save(self, _: str) -> None:
        pass


def test_a_checkpoint_of_an_earlier_version_is_a_posterior(tmp_path):
    model = fitted(tiny_llama())
    PeftModel.save_pretrained(model, tmp_path)  # as it was: G inside the adapter's file
    assert any("root_std" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    same(load_posterior(tiny_llama(), tmp_path), model)
    other = fitted(tiny_llama(), seed=9)
    other.load_adapter(tmp_path, "default")
    same(Gaussian(other.eval(), end_logits), model)


# The evident way


def test_converting_an_adapter_that_was_loaded_says_that_the_deviations_are_new(tmp_path, caplog):
    model = fitted(tiny_llama())
    model.save_pretrained(tmp_path)
    assert not caplog.records
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    bayesify(plain)
    assert "a saved posterior comes back with its own by load_posterior" in caplog.text
    plain.load_adapter(str(tmp_path), "default")
    same(Gaussian(plain.eval(), end_logits), model)


def test_a_mean_without_its_deviations_is_not_loaded_in_silence(tmp_path, caplog):
    model = fitted(tiny_llama())
    model.save_pretrained(tmp_path / "posterior")
    (tmp_path / "posterior" / "posterior.safetensors").rename(tmp_path / "kept")
    model.load_adapter(tmp_path / "posterior", "default")
    assert "is a plain adapter, loaded as the mean of 'default'" in caplog.text
    (tmp_path / "kept").rename(tmp_path / "posterior" / "posterior.safetensors")
    model.load_adapter(tmp_path / "posterior", "second")
    assert "of which the mean alone is loaded as the adapter 'second'" in caplog.text


# Copies, other bases, modes


def copies(posterior: Gaussian, tmp_path: Path) -> dict[str, Callable[[], Gaussian]]:
    def through_a_file() -> Gaussian:
        torch.save(posterior, tmp_path / "whole.pt")
        return torch.load(tmp_path / "whole.pt", weights_only=False)

    return {
        "deepcopy": lambda: copy.deepcopy(posterior),
        "copy": lambda: copy.copy(posterior),
        "pickle": lambda: pickle.loads(pickle.dumps(posterior)),
        "torch": through_a_file,
    }


@pytest.mark.parametrize("way", ["deepcopy", "copy", "pickle", "torch"])
def test_a_used_posterior_is_copied_and_each_copy_saves_itself(way, tmp_path):
    model = fitted(tiny_llama())
    model.train()
    model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
    model.zero_grad()
    posterior = Gaussian(model.eval(), end_logits)
    expected = posterior.logits(BATCH, Draws(3))
    other = copies(posterior, tmp_path)[way]()
    assert torch.equal(other.logits(BATCH, Draws(3)), expected)
    if way != "copy":
        moved(other.model, seed=9)
        assert torch.equal(posterior.logits(BATCH, Draws(3)), expected)
        assert not torch.equal(other.logits(BATCH, Draws(3)), expected)
    other.model.save_pretrained(tmp_path / "copy")
    same(load_posterior(tiny_llama(), tmp_path / "copy"), other.model)


def test_a_model_is_moved_where_parameters_are_swapped():
    posterior = Gaussian(fitted(tiny_llama()), end_logits)
    posterior.logits(BATCH, Draws(3))
    torch.__future__.set_swap_module_params_on_conversion(True)  # as tensor subclasses ask for
    try:
        posterior.model.to(torch.float64)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    fresh = Gaussian(posterior.model, end_logits).logits(BATCH, Draws(3))
    assert torch.equal(posterior.logits(BATCH, Draws(3)), fresh)


@pytest.mark.parametrize("change", ["train", "double", "bfloat16", "field"])
def test_predictions_follow_a_model_that_changes(change):
    posterior = Gaussian(fitted(tiny_llama()), end_logits)
    before = posterior.logits(BATCH, Draws(3))
    if change == "train":
        moved(posterior.model, seed=11)
    elif change == "field":
        posterior.adapter = posterior.adapter
    else:
        posterior.model.to(getattr(torch, change.replace("double", "float64")))
    fresh = Gaussian(posterior.model, end_logits).logits(BATCH, Draws(3))
    after = posterior.logits(BATCH, Draws(3))
    assert after.dtype == fresh.dtype == next(posterior.model.parameters()).dtype
    assert torch.equal(after, fresh)
    assert torch.equal(after, before) == (change == "field")


def test_another_base_of_the_same_shapes_is_refused_unless_it_is_meant(tmp_path):
    save_posterior(fitted(tiny_llama()), tmp_path)
    other = tiny_llama()
    for parameter in other.parameters():
        parameter.data.mul_(1.01)
    with pytest.raises(
        PosteriorError, match="of another base model: got other values of .*other_b"
    ):
        load_posterior(other, tmp_path)
    assert not [name for name, _ in other.named_modules() if "lora" in name]
    assert load_posterior(other, tmp_path, other_base=True).kind == "gaussian"
    wide = tiny_llama(num_attention_heads=4, head_dim=8, num_key_value_heads=4)
    with pytest.raises(PosteriorError, match=r"\['num_attention_heads', 'num_key_value_heads'\]"):
        load_posterior(wide, tmp_path)
    with pytest.raises(PosteriorError, match="of another base model"):
        load_adapter(wide, tmp_path)


@pytest.mark.parametrize(
    "kind",
    ["self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
)
def test_a_base_of_which_one_kind_of_layer_is_another_is_another_one(kind, tmp_path):
    save_posterior(fitted(tiny_llama(num_hidden_layers=30)), tmp_path)
    other = tiny_llama(num_hidden_layers=30)
    for name, parameter in other.named_parameters():
        if kind in name:
            parameter.data.mul_(1.01)
    with pytest.raises(
        PosteriorError, match=f"of another base model: got other values of .*{kind}"
    ):
        load_posterior(other, tmp_path)


def test_statistics_of_quantised_weights_are_not_sampled():
    state = {"q.weight": torch.ones(2), "q.weight.nested_absmax": torch.ones(2)}
    assert list(base_samples(nn.Linear(1, 1), state)["tensors"]) == ["q.weight"]


@pytest.mark.parametrize(
    "changes", [{"bias": "all"}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3]}]
)
def test_a_base_has_the_same_samples_with_and_without_an_adapter(changes):
    plain = frozen_samples(tiny_llama())
    assert frozen_samples(fitted(tiny_llama(), **changes)) == plain
    assert "lm_head.weight" in plain["tensors"]


def test_a_base_with_copied_layers_left_in_it_is_another_one(tmp_path):
    save_posterior(fitted(tiny_llama(), layers_to_transform=[0]), tmp_path / "plain")
    copied = fitted(tiny_llama(), layer_replication=[[0, 2], [0, 2]])
    save_posterior(copied, tmp_path / "copied")
    same(load_posterior(tiny_llama(), tmp_path / "copied"), copied)
    base = copied.unload()  # PEFT leaves the copies in
    with pytest.raises(PosteriorError, match=r"got other values of \['num_hidden_layers'\]"):
        load_posterior(base, tmp_path / "plain")


@pytest.mark.parametrize(
    ("here", "there"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.float64),
    ],
)
def test_the_base_may_be_in_another_precision(here, there, tmp_path):
    save_posterior(fitted(tiny_llama().to(here)), tmp_path)
    assert load_posterior(tiny_llama().to(there), tmp_path).kind == "gaussian"


@pytest.mark.parametrize("kept_in", [torch.bfloat16, torch.float16])
def test_an_adapter_in_16_bits_has_the_same_draws_when_it_is_loaded(kept_in, tmp_path):
    model = fitted(tiny_llama()).to(kept_in)
    save_posterior(model, tmp_path)
    loaded = load_posterior(tiny_llama().to(kept_in), tmp_path)
    for name, weight in Gaussian(model, end_logits).draw(1).items():
        assert torch.equal(loaded.draw(1)[name], weight)  # type: ignore[attr-defined]


def test_the_base_may_be_quantised(tmp_path):
    save_posterior(fitted(tiny_llama()), tmp_path)
    base = tiny_llama()
    for layer in base.model.layers:
        layer.mlp.up_proj.weight = nn.Parameter(
            torch.zeros(8, dtype=torch.int8), requires_grad=False
        )
    assert load_posterior(base, tmp_path).kind == "gaussian"


def test_merging_and_taking_out_again_is_no_other_base(tmp_path):
    model = fitted(tiny_llama(), target_modules="all-linear")
    for _ in range(20):
        model.merge_adapter()
        model.unmerge_adapter()
    expected = Gaussian(model, end_logits).logits(BATCH, Draws(2))
    save_posterior(model, tmp_path / "apart")
    model.merge_adapter()
    save_posterior(model, tmp_path / "merged")
    for folder in ("apart", "merged"):
        loaded = load_posterior(tiny_llama(), tmp_path / folder, end_logits)
        assert_close(loaded.logits(BATCH, Draws(2)), expected, rtol=1e-4, atol=1e-4)


def test_folders_without_samples_of_the_base_load_as_before(tmp_path):
    save_posterior(fitted(tiny_llama()), tmp_path)
    details = read_details(tmp_path)
    del details["base_samples"]
    (tmp_path / DETAILS).write_text(json.dumps(details), encoding="utf-8")
    assert load_posterior(tiny_llama(), tmp_path).kind == "gaussian"


def test_a_base_with_an_adapter_is_refused(tmp_path):
    base = tiny_llama()
    save_posterior(fitted(base), tmp_path)
    with pytest.raises(
        PosteriorError, match="got a base with an adapter on it, which would be rep"
    ):
        load_posterior(base, tmp_path)


def test_another_user_can_read_what_is_written(tmp_path):
    model = fitted(tiny_llama())
    save_posterior(Mixture([Gaussian(model, end_logits)]), tmp_path / "ours")
    model.save_pretrained(tmp_path / "own")
    export_draw(Gaussian(model, end_logits), 0, tmp_path / "draw")
    (tmp_path / "any").touch()
    mode = stat.S_IMODE((tmp_path / "any").stat().st_mode)
    written = [path for path in tmp_path.rglob("*.*") if path.is_file()]
    assert len(written) > 8
    for path in written:
        assert stat.S_IMODE(path.stat().st_mode) == mode, path


def test_paths_are_text_or_paths_and_home_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = fitted(tiny_llama())
    assert save_posterior(model, "~/saved") == tmp_path / "saved"
    posterior = load_posterior(tiny_llama(), "~/saved", end_logits)
    assert read_details("~/saved")["posterior"] == "gaussian"
    export_draw(posterior, 0, "~/draw")
    assert load_adapter(tiny_llama(), "~/draw").kind == "point"


def test_a_name_that_is_neither_a_folder_nor_on_the_hub_is_refused():
    with pytest.raises(
        PosteriorError, match="got no such folder, and no such repository on the Hu"
    ):
        load_posterior(tiny_llama(), "someone/nothing")


# Several adapters


def settings(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": QV, **changes})


SECOND = {
    "scaling": {"lora_alpha": 40},
    "alphas": {"alpha_pattern": {"v_proj": 40}},
    "rsLoRA": {"use_rslora": True},
    "ranks": {"rank_pattern": {"v_proj": 2}},
    "biases": {"lora_bias": True},
    "norm": {"modules_to_save": ["norm"]},
    "dora": {"use_dora": True},
}


@pytest.mark.parametrize("change", SECOND)
def test_members_keep_their_own_settings(change, tmp_path):
    configs = [settings(), settings(**SECOND[change])]
    if len(change) % 2:
        configs.reverse()
    folders = []
    for seed, config in enumerate(configs):
        model = moved(get_peft_model(tiny_llama(), config), seed)
        folders.append(save_posterior(model, tmp_path / f"{seed}"))
    alone = [load_posterior(tiny_llama(), folder, end_logits) for folder in folders]
    expected = torch.cat([one.logits(BATCH, Draws(1)) for one in alone])
    mixture = Mixture(load_members(tiny_llama(), folders, end_logits))
    assert_close(mixture.logits(BATCH, Draws(2)), expected, rtol=1e-5, atol=1e-5)
    again = load_posterior(tiny_llama(), save_posterior(mixture, tmp_path / "both"), end_logits)
    assert_close(again.logits(BATCH, Draws(2)), expected, rtol=1e-5, atol=1e-5)


def test_members_may_have_trained_tokens_if_all_have_some(tmp_path):
    folders = []
    for seed, tokens in enumerate([[5], [7, 9], None]):
        model = get_peft_model(tiny_llama(), settings(trainable_token_indices=tokens))
        folders.append(save_posterior(moved(model, seed), tmp_path / f"{seed}"))
    alone = [load_posterior(tiny_llama(), folder, end_logits) for folder in folders[:2]]
    expected = torch.cat([one.logits(BATCH, Draws(1)) for one in alone])
    mixture = Mixture(load_members(tiny_llama(), folders[:2], end_logits))
    assert_close(mixture.logits(BATCH, Draws(2)), expected)
    with pytest.raises(PosteriorError, match="cannot load these members on one model: got 3 of wh"):
        load_members(tiny_llama(), folders, end_logits)
    model = mixture.model
    model.add_adapter("plain", settings())  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"PEFT cannot save the adapter 'plain': got one without"):
        save_posterior(Point(model, end_logits, adapter="plain"), tmp_path / "plain")


def test_a_gaussian_adapter_beside_a_plain_one(tmp_path):
    model = get_peft_model(tiny_llama(), settings())
    model.add_adapter("b", settings(r=2))
    bayesify(model, adapter="b")
    model.set_adapter("b")
    moved(model)
    model.set_adapter("default")
    with pytest.raises(ValueError, match=r"got the plain adapter 'default' active, while \['b'\]"):
        save_posterior(model, tmp_path)
    save_posterior(model, tmp_path / "named", adapter="b")
    model.set_adapter("b")
    save_posterior(model, tmp_path / "active")
    for folder in ("named", "active"):
        same(load_posterior(tiny_llama(), tmp_path / folder), model)
    model.base_model.set_adapter(["default", "b"])
    with pytest.raises(ValueError, match="is used together with others: got the active adapters"):
        save_posterior(model, tmp_path / "two", adapter="b")


# What is refused


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_an_init_that_changes_the_base_is_refused_before_the_fit(init, tmp_path):
    model = get_peft_model(tiny_llama(), settings(init_lora_weights=init))
    with pytest.raises(ValueError, match=f"cannot be saved right: got init_lora_weights='{init}'"):
        bayesify(model)
    assert not any(hasattr(slot, "root_std") for slot in Slots(model).modules().values())
    with pytest.raises(ValueError, match="which changes the base model's weights"):
        save_posterior(model, tmp_path)


def test_the_remedy_for_such_an_init_works(tmp_path):
    model = get_peft_model(tiny_llama(), settings(init_lora_weights="pissa"))
    residual = copy.deepcopy(model).unload()
    model.peft_config["default"].init_lora_weights = True
    bayesify(model)
    same(load_posterior(residual, save_posterior(moved(model), tmp_path)), model)
    with pytest.raises(PosteriorError, match="of another base model"):
        load_posterior(tiny_llama(), tmp_path)


def test_a_scaling_that_no_configuration_says_is_refused(tmp_path):
    model = fitted(tiny_llama())
    next(iter(Slots(model).layers.values())).scale_layer(2.0)
    with pytest.raises(ValueError, match="a scaling that is not saved: got 4 in .*expected 2"):
        save_posterior(model, tmp_path)


def test_other_adapters_than_lora_are_refused(tmp_path):
    config = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    prompt = get_peft_model(tiny_llama(), config)
    with pytest.raises(ValueError, match="is no LoRA: got PROMPT_TUNING, expected LORA"):
        save_posterior(prompt, tmp_path)
    with pytest.raises(ValueError, match="no LoRA layer holds the adapter"):
        bayesify(prompt)
    prompt.save_pretrained(tmp_path)
    with pytest.raises(PosteriorError, match="is not a LoRA adapter: got a PROMPT_TUNING adapter"):
        load_adapter(tiny_llama(), tmp_path)
    scaled = IA3Config(target_modules=QV, feedforward_modules=[])
    with pytest.raises(ValueError, match="is no LoRA: got IA3, expected LORA"):
        save_posterior(get_peft_model(tiny_llama(), scaled), tmp_path)
    with pytest.raises(ValueError, match="cannot be saved: got a LlamaForCausalLM, expected the m"):
        save_posterior(tiny_llama(), tmp_path)
    with pytest.raises(ValueError, match="a Gaussian adapter cannot be converted"):
        fitted(tiny_llama()).save_pretrained(
            tmp_path, path_initial_model_for_weight_conversion=str(tmp_path / "start")
        )


def test_draws_of_b_with_a_bias_are_refused():
    model = get_peft_model(tiny_llama(), settings(lora_bias=True))
    with pytest.raises(ValueError, match=r"its lora_B has a bias \(lora_bias\), which draws of it"):
        bayesify(model, slots=Slots(model).names(["lora_B"]))


def test_models_without_an_embedding_of_tokens_are_saved(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(**sizes, intermediate_size=16, image_size=8, patch_size=4)
    torch.manual_seed(0)
    base = ViTForImageClassification(config)
    linear = [name for name, part in base.named_modules() if isinstance(part, nn.Linear)]
    names = [name for name in linear if "attention" in name]
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=names))
    bayesify(model)
    model.save_pretrained(tmp_path)
    assert load_posterior(base, tmp_path).kind == "gaussian"


# Adapters without PEFT's wrapper


def with_own_adapter(monkeypatch, **bayes: Any) -> Any:
    """A converted model whose own `add_adapter` made the adapter."""
    # what it asks of PEFT's version may be later than the one here
    monkeypatch.setattr(transformers.integrations.peft, "MIN_PEFT_VERSION", "0.18.0")
    model: Any = tiny_llama()
    model.add_adapter(LoraConfig(r=4, target_modules=QV))
    bayesify(model, **bayes)
    return moved(model)


def test_an_adapter_of_the_models_own_add_adapter_is_saved_as_a_posterior(tmp_path, monkeypatch):
    model = with_own_adapter(monkeypatch, noise="independent")
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "root_std" in name]  # noqa: SIM118
    loaded = load_posterior(tiny_llama(), tmp_path)
    same(loaded, model)
    layers = Slots(loaded.model).of_kind(GaussianLinear)
    assert {layer.noise for layer in layers.values()} == {"independent"}
    other = tiny_llama()
    for parameter in other.parameters():
        parameter.data.mul_(1.01)
    with pytest.raises(PosteriorError, match="of another base model"):
        load_posterior(other, tmp_path)
    with pytest.raises(ValueError, match=r"made is saved by its model.save_pretrained\(folder\)"):
        save_posterior(model, tmp_path / "ours")
    copied = copy.deepcopy(model)
    moved(copied, seed=8)
    copied.save_pretrained(tmp_path / "copy")
    same(load_posterior(tiny_llama(), tmp_path / "copy"), copied)
