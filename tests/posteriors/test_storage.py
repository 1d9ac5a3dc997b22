"""A saved posterior is a stock adapter, comes back as it was, and a damaged one is refused."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from bayestune.adapters import GaussianLinear, Slots, bayesify
from bayestune.forward import Draws
from bayestune.posteriors import (
    DETAILS,
    Gaussian,
    Mixture,
    Point,
    PosteriorError,
    base_name,
    export_draw,
    load_adapter,
    load_members,
    load_posterior,
    read_details,
    save_posterior,
)
from bayestune.posteriors.storage import TENSORS
from tiny import BATCH, CLOSE, adapted, converted, end_logits, tiny_bert, tiny_llama, with_second

ADAPTER_FILES = ["adapter_config.json", "adapter_model.safetensors"]
TARGETS = ["q_proj", "v_proj", "lm_head"]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def model() -> nn.Module:
    return converted(tiny_llama(), root_std=0.4, target_modules=TARGETS)


@pytest.fixture
def saved(model, tmp_path) -> Path:
    details = {"method": "blob", "base_model": "tiny"}
    return save_posterior(model, tmp_path / "posterior", details)


def test_the_adapter_is_stock_lora_and_loads_in_plain_peft_without_a_warning(model, saved):
    with safe_open(saved / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
    assert len(names) == 10
    assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in names)
    base = tiny_llama()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        plain = PeftModel.from_pretrained(base, saved).eval()
    assert not Slots(plain).of_kind(GaussianLinear)
    assert torch.equal(end_logits(plain, BATCH), end_logits(model, BATCH))


def test_a_posteriors_folder_holds_what_was_told_of_it(saved):
    details = read_details(saved)
    assert [details[name] for name in ("method", "posterior", "base_model")] == [
        "blob",
        "gaussian",
        "tiny",
    ]
    assert names_in(saved) == [*ADAPTER_FILES, DETAILS, TENSORS]


def test_saving_again_replaces_and_leaves_nothing_behind(model, saved):
    with torch.no_grad():
        next(iter(Slots(model).modules().values())).weight.add_(1.0)
    save_posterior(model, saved)
    assert names_in(saved) == [*ADAPTER_FILES, DETAILS, TENSORS]
    loaded = load_posterior(tiny_llama(), saved, end_logits)
    assert torch.equal(end_logits(loaded.model, BATCH), end_logits(model, BATCH))


def test_the_training_noise_comes_back_and_may_be_trained_on(tmp_path):
    model = adapted(tiny_llama())
    bayesify(model, init_root_std=0.07, noise="token")
    loaded = load_posterior(tiny_llama(), save_posterior(model, tmp_path), trainable=True)
    layer = next(iter(Slots(loaded.model).of_kind(GaussianLinear).values()))
    assert (layer.noise, layer.init_root_std) == ("token", 0.07)
    assert layer.weight.requires_grad
    assert layer.root_std.requires_grad


def test_a_plain_model_is_saved_as_a_point_and_needs_a_scorer_to_be_asked(tmp_path):
    loaded = load_posterior(tiny_llama(), save_posterior(adapted(tiny_llama()), tmp_path))
    assert loaded.kind == read_details(tmp_path)["posterior"] == "point"
    with pytest.raises(ValueError, match="the posterior has no scorer"):
        loaded.logits(BATCH, Draws(1))


def test_a_mixture_is_kept_member_by_member(tmp_path):
    model = adapted(tiny_llama())
    for folder in ("0", "1"):
        with torch.no_grad():
            next(iter(Slots(model).modules().values())).weight.add_(0.1)
        save_posterior(Point(model, end_logits), tmp_path / folder)
    folders = [tmp_path / "0", tmp_path / "1"]
    mixture = Mixture(load_members(tiny_llama(), folders, end_logits))
    assert mixture.model.active_adapter == "default"
    both = save_posterior(mixture, tmp_path / "both")
    assert names_in(both) == ["member-0", "member-1", DETAILS]
    alone = load_posterior(tiny_llama(), both / "member-1", end_logits)
    expected = mixture.logits(BATCH, Draws(2))[1]
    assert_close(alone.logits(BATCH, Draws(0))[0], expected, **CLOSE)


def test_the_base_is_read_from_the_adapters_configuration(tmp_path):
    assert base_name(tmp_path) is None
    (tmp_path / ADAPTER_FILES[0]).write_text('{"base_model_name_or_path": "tiny"}')
    assert base_name(tmp_path) == "tiny"


# Exports


def assert_exported(expected: torch.Tensor, folder: Path, base: Callable[[], nn.Module]) -> None:
    """Checks that a folder of a draw is a plain adapter with these logits."""
    assert names_in(folder) == ADAPTER_FILES
    plain = load_adapter(base(), folder, end_logits if base is tiny_llama else classes)
    assert_close(plain.logits(BATCH, Draws(0))[0], expected, **CLOSE)


def classes(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).logits


def test_a_draw_is_exported_by_its_number_or_its_weights(model, tmp_path):
    posterior = Gaussian(model, end_logits)
    expected = posterior.logits(BATCH, Draws(4, seed=5))[3]
    weights = posterior.draw(3, seed=5)
    assert_exported(expected, export_draw(posterior, 3, tmp_path / "a", seed=5), tiny_llama)
    assert_exported(expected, export_draw(posterior, weights, tmp_path / "b"), tiny_llama)
    assert_exported(expected, export_draw(model, weights, tmp_path / "c"), tiny_llama)


def test_an_adapter_of_another_name_is_saved_and_exported_as_itself(tmp_path):
    model = with_second(adapted(tiny_llama(), "mine", r=4))
    bayesify(model, init_root_std=0.5, adapter="b")
    posterior = Gaussian(model.eval(), end_logits, adapter="b")
    logits = posterior.logits(BATCH, Draws(2))
    loaded = load_posterior(tiny_llama(), save_posterior(posterior, tmp_path / "saved"), end_logits)
    assert torch.equal(loaded.logits(BATCH, Draws(2)), logits)
    assert_exported(logits[1], export_draw(posterior, 1, tmp_path / "a"), tiny_llama)
    assert_exported(
        logits[1], export_draw(posterior, posterior.draw(1), tmp_path / "b"), tiny_llama
    )
    with pytest.raises(ValueError, match=r"got a model with the adapters \['mine', 'b'\], expect"):
        export_draw(model, {}, tmp_path / "unclear")


def test_a_member_is_exported_with_a_head_of_its_own(tmp_path):
    model = adapted(tiny_bert(), target_modules=["query", "value"], task_type="SEQ_CLS")
    with_second(model)
    mixture = Mixture([Point(model, classes), Point(model, classes, adapter="b")])
    logits = mixture.logits(BATCH, Draws(2))
    for index in (0, 1):
        folder = export_draw(mixture, index, tmp_path / f"{index}")
        assert_exported(logits[index], folder, tiny_bert)
    with pytest.raises(ValueError, match="which adapter the draw belongs to is not clear"):
        export_draw(mixture, mixture.draw(1), tmp_path / "unclear")


def test_a_draw_of_another_model_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r"a draw of another model: got the slots \['elsewhere'\]"):
        export_draw(model, {"elsewhere": torch.zeros(8, 32)}, tmp_path / "draw")


# Refusals


def test_folders_that_are_not_posteriors_are_refused(tmp_path):
    adapted(tiny_llama()).save_pretrained(tmp_path)
    with pytest.raises(PosteriorError, match="got a plain LoRA adapter without posterior.json"):
        load_posterior(tiny_llama(), tmp_path)
    with pytest.raises(PosteriorError, match="got no adapter without posterior.json"):
        read_details(tmp_path / "empty")
    with pytest.raises(PosteriorError, match="is not a LoRA adapter: got no adapter_config.json"):
        load_adapter(tiny_llama(), tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (TENSORS, "is missing, damaged or cut off"),
        ("adapter_model.safetensors", "does not fit this model or is damaged"),
        (DETAILS, "posterior.json is damaged or cut off"),
    ],
)
def test_a_file_that_is_cut_off_is_refused(name, reason, saved):
    whole = (saved / name).read_bytes()
    (saved / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PosteriorError, match=reason):
        load_posterior(tiny_llama(), saved)


def test_a_file_that_is_missing_is_refused(saved):
    (saved / TENSORS).unlink()
    with pytest.raises(PosteriorError, match="is missing, damaged or cut off"):
        load_posterior(tiny_llama(), saved)


def test_another_model_is_refused(saved):
    other = tiny_llama(hidden_size=48, intermediate_size=96)
    with pytest.raises(
        PosteriorError, match="is of another base model: got other values of .*, ti"
    ):
        load_posterior(other, saved)
    with pytest.raises(
        PosteriorError, match="does not fit this model or is damaged; its base is t"
    ):
        load_posterior(other, saved, other_base=True)


def test_another_rank_is_refused(saved, tmp_path):
    model = converted(tiny_llama(), r=4, target_modules=TARGETS)
    other = save_posterior(model, tmp_path / "other")
    save_file(load_file(other / TENSORS), saved / TENSORS)
    with pytest.raises(PosteriorError, match="of another model or rank: got 5 tensors .*4, 32"):
        load_posterior(tiny_llama(), saved)


def test_another_mean_is_refused(saved):
    path = saved / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).add_(1e-3)
    save_file(tensors, path)
    with pytest.raises(PosteriorError, match="is not the one its posterior.json was written for"):
        load_posterior(tiny_llama(), saved)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": 99}, "has format 99, expected 1: .*upgrade bayestune"),
        ({"posterior": "cloud"}, "is of the family 'cloud', expected one of"),
    ],
)
def test_what_a_later_version_wrote_is_refused(change, reason, saved):
    details = read_details(saved)
    (saved / DETAILS).write_text(json.dumps(details | change), encoding="utf-8")
    with pytest.raises(PosteriorError, match=reason):
        load_posterior(tiny_llama(), saved)
