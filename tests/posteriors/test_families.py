"""The forms of posterior: their draws' moments, what an artefact keeps of them, what they refuse."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from bayestune.adapters import Slots, bayesify, detach
from bayestune.forward import Draws
from bayestune.posteriors import (
    KINDS,
    LowRank,
    Mixture,
    Point,
    Scaled,
    load_adapter,
    load_posterior,
    read_details,
    save_posterior,
)
from bayestune.posteriors.posterior import Saved
from bayestune.posteriors.storage import PosteriorError

IDS = torch.arange(1, 11).reshape(2, 5)
BATCH = {"input_ids": IDS}
COUNT = 4000


def score(model, batch):
    return model(input_ids=batch["input_ids"]).logits[:, -1, :4]


@pytest.fixture
def model(llama):
    torch.manual_seed(1)
    adapted = get_peft_model(
        llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    for slot in Slots(adapted).modules().values():
        torch.nn.init.normal_(slot.weight, std=0.3)
    return adapted.eval()


def first(model, side="A"):
    return next(name for name in Slots(model).modules() if name.endswith(side))


def draws_of(posterior, name):
    return torch.stack([posterior.draw(index)[name] for index in range(COUNT)]).double()


def assert_mean(draws, expected, variance):
    assert ((draws.mean(0) - expected) / (variance / COUNT).sqrt()).abs().max() < 4.5


def test_normal_factors_shift_whole_rows_along_their_direction(model):
    name = first(model)
    mean = Slots(model).modules()[name].weight.detach().double()
    std, direction = torch.tensor([[0.1], [0.2], [0.3], [0.4]]), torch.randn(mean.shape)
    draws = draws_of(Scaled(model, score, {name: std}, "normal", {name: direction}), name)
    variance = (std * direction).double().square()
    assert_mean(draws, mean, variance)
    spread = (draws.var(0) / variance - 1) / math.sqrt(2 / COUNT)
    assert spread.abs().max() < 4.5
    noise = (draws - mean) / (std * direction).double()
    torch.testing.assert_close(noise, noise[..., :1].expand_as(noise), atol=1e-4, rtol=1e-3)
    assert torch.corrcoef(noise[..., 0].T).fill_diagonal_(0).abs().max() < 4.5 / math.sqrt(COUNT)


def test_bernoulli_factors_keep_ranks_as_often_as_they_say(model):
    name = first(model)
    mean = Slots(model).modules()[name].weight.detach().double()
    kept = torch.tensor([[0.2], [0.5], [0.8], [1.0]])
    draws = draws_of(Scaled(model, score, {name: kept}), name)
    assert_mean(draws[:, :3], mean[:3], (mean.square() * (1 / kept.double() - 1))[:3])
    assert torch.allclose(draws[:, 3], mean[3])
    share = (draws[:, :, 0] != 0).double().mean(0)
    assert (
        (share - kept[:, 0]) / (kept * (1 - kept) / COUNT).sqrt()[:, 0].clamp_min(1e-9)
    ).abs().max() < 4.5


def test_low_rank_draws_have_the_stated_covariance_across_slots(model):
    torch.manual_seed(2)
    names = [first(model), first(model, "B")]
    shapes = {name: Slots(model).modules()[name].weight.shape for name in names}
    variances = {name: torch.rand(shape) / 50 for name, shape in shapes.items()}
    deviations = {name: torch.randn(3, *shape) / 10 for name, shape in shapes.items()}
    posterior = LowRank(model, score, variances, deviations)
    drawn = [posterior.draw(index) for index in range(COUNT)]
    draws = torch.stack(
        [torch.cat([d[name].flatten()[:6] for name in names]) for d in drawn]
    ).double()
    mean = torch.cat(
        [Slots(model).modules()[name].weight.detach().flatten()[:6] for name in names]
    ).double()
    d = torch.cat([deviations[name].flatten(1)[:, :6] for name in names], 1).double()
    covariance = (
        d.T @ d / (2 * (3 - 1))
        + torch.cat([variances[n].flatten()[:6] for n in names]).double().diag() / 2
    )
    assert_mean(draws, mean, covariance.diag())
    error = (covariance.diag()[:, None] * covariance.diag() + covariance.square()) / COUNT
    assert ((draws.T.cov() - covariance) / error.sqrt()).abs().max() < 4.5


def make(kind, model):
    name = first(model)
    shape = Slots(model).modules()[name].weight.shape
    if kind == "scaled":
        return Scaled(model, score, {name: torch.full((1, shape[1]), 0.7)})
    return LowRank(model, score, {name: torch.rand(shape)}, {name: torch.randn(2, *shape)})


@pytest.mark.parametrize("kind", ["scaled", "low_rank"])
def test_draws_come_back_from_an_artefact(kind, model, llama, tmp_path):
    posterior = make(kind, model)
    loaded = load_posterior(llama(), save_posterior(posterior, tmp_path), score)
    assert loaded.kind == read_details(tmp_path)["posterior"] == kind
    assert torch.equal(loaded.logits(BATCH, Draws(3)), posterior.logits(BATCH, Draws(3)))
    assert posterior.logits(BATCH, Draws(3)).var(0).max() > 0


@pytest.mark.parametrize("kind", ["scaled", "low_rank"])
def test_tensors_of_another_rank_or_model_are_refused(kind, model):
    tensors, facts = make(kind, model).state()
    cut = {name: value[..., :5] for name, value in tensors.items()}
    with pytest.raises(ValueError, match="of another model or rank: got"):
        KINDS[kind].restore(Saved(model, score, cut, facts))
    elsewhere = {f"no.{name}": value for name, value in tensors.items()}
    with pytest.raises(ValueError, match="of another model or rank: got"):
        KINDS[kind].restore(Saved(model, score, elsewhere, facts))


def test_a_mixture_is_kept_member_by_member(model, llama, tmp_path):
    for k in range(2):
        with torch.no_grad():
            Slots(model).modules()[first(model)].weight.add_(0.1 * k)
        save_posterior(Point(model, score), tmp_path / f"{k}")
    from bayestune.posteriors import load_members

    mixture = Mixture(load_members(llama(), [tmp_path / "0", tmp_path / "1"], score))
    again = load_posterior(llama(), save_posterior(mixture, tmp_path / "both"), score)
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == [
        "member-0",
        "member-1",
        "posterior.json",
    ]
    assert torch.equal(again.logits(BATCH, Draws(2)), mixture.logits(BATCH, Draws(2)))
    alone = load_posterior(llama(), tmp_path / "both" / "member-1", score).logits(BATCH, Draws(1))[
        0
    ]
    torch.testing.assert_close(mixture.logits(BATCH, Draws(2))[1], alone, atol=1e-5, rtol=1e-5)


def test_a_form_that_is_not_known_is_refused(model, llama, tmp_path):
    folder = save_posterior(model, tmp_path)
    path = folder / "posterior.json"
    path.write_text(
        path.read_text(encoding="utf-8").replace('"point"', '"cloud"'), encoding="utf-8"
    )
    with pytest.raises(PosteriorError, match="is of the family 'cloud', expected one of"):
        load_posterior(llama(), folder)


def test_a_folder_without_an_adapter_is_refused(llama, tmp_path):
    with pytest.raises(PosteriorError, match="is not a LoRA adapter: got no adapter_config.json"):
        load_adapter(llama(), tmp_path)


def test_slots_that_a_model_has_not_are_refused(model):
    with pytest.raises(ValueError, match=r"no such LoRA layer: got \['nowhere'\]"):
        bayesify(model, slots=["nowhere.lora_A"])
    with pytest.raises(ValueError, match="no LoRA layer holds the adapter 'default'"):
        bayesify(model, slots=[])
    assert bayesify(model, slots=Slots(model).names(("lora_B",), ("v_proj",))) == 2
    assert all("v_proj.lora_B" in name for name in Slots(model).names(("lora_B",), ("v_proj",)))


def test_detaching_gives_back_the_base_with_its_own_head(bert):
    base = bert()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    adapted = get_peft_model(base, LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    assert Slots(adapted).weights()
    after = detach(adapted).state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
