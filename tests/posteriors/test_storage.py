"""A saved posterior is a stock adapter, comes back bit for bit, and a damaged one is refused by name."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from bayestune.adapters import GaussianLinear, Slots, bayesify
from bayestune.forward import Draws
from bayestune.posteriors import (
    DETAILS,
    Gaussian,
    export_draw,
    load_posterior,
    read_details,
    save_posterior,
)
from bayestune.posteriors.storage import TENSORS, PosteriorError

IDS = torch.arange(3, 27).reshape(2, 12)
BATCH = {"input_ids": IDS}
TARGETS = ["q_proj", "v_proj", "lm_head"]


def score(model: nn.Module, batch) -> torch.Tensor:
    return model(input_ids=batch["input_ids"]).logits[:, -1, :5]


def fitted(base: nn.Module, rank: int = 8, gaussian: bool = True) -> PeftModel:
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=rank, target_modules=TARGETS, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    if gaussian:
        bayesify(model, init_root_std=0.4)
    return model.eval()


@pytest.fixture
def saved(llama, tmp_path):
    model = fitted(llama())
    return model, save_posterior(
        model, tmp_path / "posterior", {"method": "blob", "base_model": "tiny"}
    )


def test_the_adapter_is_stock_lora_and_loads_in_plain_peft_without_a_warning(saved, llama):
    model, folder = saved
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in file.keys())  # noqa: SIM118
        assert len(list(file.keys())) == 10
    base = llama()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        plain = PeftModel.from_pretrained(base, folder).eval()
    assert not Slots(plain).of_kind(GaussianLinear)
    mean = Gaussian(model, score).logits(BATCH, Draws(0))[0]
    with torch.no_grad():
        assert torch.equal(score(plain, BATCH), mean)


def test_loading_gives_the_same_draws_bit_for_bit(saved, llama):
    model, folder = saved
    before, after, details = (
        Gaussian(model, score),
        load_posterior(llama(), folder, score),
        read_details(folder),
    )
    assert (details["method"], details["posterior"], details["base_model"]) == (
        "blob",
        "gaussian",
        "tiny",
    )
    for index in (0, 7):
        first, second = before.draw(index, seed=2), after.draw(index, seed=2)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[path], second[path]) for path in first)
    assert torch.equal(before.logits(BATCH, Draws(4)), after.logits(BATCH, Draws(4)))
    assert not after.model.training


def test_noise_and_its_start_come_back(llama, tmp_path):
    model = fitted(llama(), gaussian=False)
    bayesify(model, init_root_std=0.07, noise="token")
    loaded = load_posterior(llama(), save_posterior(model, tmp_path), trainable=True)
    layer = next(iter(Slots(loaded.model).of_kind(GaussianLinear).values()))
    assert (layer.noise, layer.init_root_std) == ("token", 0.07)
    assert layer.weight.requires_grad
    assert layer.root_std.requires_grad


def test_a_point_is_saved_as_one(llama, tmp_path):
    model = fitted(llama(), gaussian=False)
    loaded = load_posterior(llama(), save_posterior(model, tmp_path))
    assert loaded.kind == read_details(tmp_path)["posterior"] == "point"
    with torch.no_grad():
        assert torch.equal(score(loaded.model, BATCH), score(model, BATCH))
    with pytest.raises(ValueError, match="the posterior has no scorer"):
        loaded.logits(BATCH, Draws(1))


def test_a_draw_exports_as_plain_lora_with_that_draws_outputs(saved, llama, tmp_path):
    model, _ = saved
    posterior = Gaussian(model, score)
    folder = export_draw(model, posterior.draw(3, seed=5), tmp_path / "draw")
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    plain = PeftModel.from_pretrained(llama(), folder).eval()
    with torch.no_grad():
        exported = score(plain, BATCH)
    expected = posterior.logits(BATCH, Draws(4, seed=5))[3]
    torch.testing.assert_close(exported, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(exported, posterior.logits(BATCH, Draws(0))[0], atol=1e-3)


def test_saving_again_replaces_and_leaves_nothing_behind(saved):
    model, folder = saved
    before = sorted(path.name for path in folder.iterdir())
    save_posterior(model, folder)
    assert sorted(path.name for path in folder.iterdir()) == before
    assert len(before) == 4


# Refusals


def test_a_foreign_adapter_folder(llama, tmp_path):
    fitted(llama(), gaussian=False).save_pretrained(tmp_path)
    with pytest.raises(
        PosteriorError, match="is not a posterior: got a plain LoRA adapter without posterior.json"
    ):
        load_posterior(llama(), tmp_path)
    with pytest.raises(PosteriorError, match="got no adapter without posterior.json"):
        read_details(tmp_path / "empty")


def test_a_file_cut_off_in_the_middle(saved, llama):
    _, folder = saved
    for name in (TENSORS, "adapter_model.safetensors"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(PosteriorError, match="damaged"):
            load_posterior(llama(), folder)
        (folder / name).write_bytes(whole)
    text = (folder / DETAILS).read_text()
    (folder / DETAILS).write_text(text[: len(text) // 2])
    with pytest.raises(PosteriorError, match=r"posterior.json is damaged or cut off"):
        load_posterior(llama(), folder)
    (folder / DETAILS).write_text(text)
    (folder / TENSORS).unlink()
    with pytest.raises(PosteriorError, match="is missing, damaged or cut off"):
        load_posterior(llama(), folder)


def test_another_model(saved, llama):
    _, folder = saved
    with pytest.raises(
        PosteriorError, match="does not fit this model or is damaged; its base is tiny"
    ):
        load_posterior(llama(hidden_size=48, intermediate_size=96), folder)


def test_another_rank(saved, llama, tmp_path):
    _, folder = saved
    other = save_posterior(fitted(llama(), rank=4), tmp_path / "other")
    save_file(load_file(other / TENSORS), folder / TENSORS)
    with pytest.raises(
        PosteriorError, match="is of another model or rank: got 5 tensors such as .*4, 32"
    ):
        load_posterior(llama(), folder)


def test_another_mean(saved, llama, tmp_path):
    _, folder = saved
    model = fitted(llama(), gaussian=False)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_A" in name).add_(1e-3)
    model.save_pretrained(folder, save_embedding_layers=False)
    with pytest.raises(PosteriorError, match="is not the one its posterior.json was written for"):
        load_posterior(llama(), folder)


def test_a_later_format(saved, llama):
    _, folder = saved
    details = json.loads((folder / DETAILS).read_text())
    (folder / DETAILS).write_text(json.dumps({**details, "format": 99}))
    with pytest.raises(PosteriorError, match="has format 99, expected 1: .*upgrade bayestune"):
        load_posterior(llama(), folder)


def test_a_draw_of_another_model(saved, tmp_path):
    model, _ = saved
    with pytest.raises(ValueError, match=r"a draw of another model: got the slots \['elsewhere'\]"):
        export_draw(model, {"elsewhere": torch.zeros(8, 32)}, tmp_path / "draw")
