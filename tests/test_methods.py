"""One suite over all methods: what a method and its posterior promise, whichever it is."""

from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from bayestune.artefact import export_draw, load_posterior, save_posterior
from bayestune.lora import Lora
from bayestune.methods import METHODS
from bayestune.forms import Gaussian, Point
from bayestune.posterior import Draws, predict
from bayestune.scoring import make_scorer
from bayestune.training import Training

TRAINING = Training(lora=Lora(targets=("q_proj", "v_proj")), steps=8, learning_rate=1e-2, progress=False)


@pytest.fixture(params=sorted(METHODS))
def method(request):
    return METHODS[request.param]()


@pytest.fixture(params=["letter", "text"])
def scoring(request):
    return request.param


@pytest.fixture
def scorer(llama, byte_level, tiny_task, scoring):
    return make_scorer(llama(), byte_level, tiny_task, scoring)


@pytest.fixture
def batch(scorer, tiny_task):
    batch = scorer.collate(scorer.encode(tiny_task.evaluation))
    batch.pop("labels")
    return batch


def test_fit_returns_a_posterior_with_finite_draws(method, scorer, batch, llama):
    posterior = method.fit(llama(), scorer, TRAINING)
    logits = posterior.logits(batch, Draws(3))
    assert logits.shape == (3, 6, 4)
    assert torch.equal(logits.isfinite().all(0), batch["option_mask"])
    prediction = predict(posterior, batch, 3)
    torch.testing.assert_close(prediction.probabilities.sum(-1), torch.ones(6, dtype=torch.float64))
    assert posterior.fitted["steps"] == 8
    assert posterior.fitted["seconds"] > 0
    assert posterior.fitted["peak_memory_mb"] > 0


def test_the_bases_weights_are_bit_identical_afterwards(method, scorer, llama):
    base = llama()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    posterior = method.fit(base, scorer, TRAINING)
    after = posterior.model.unload().state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_same_seed_same_fit(method, scorer, batch, llama):
    first, second, other = (
        method.fit(llama(), scorer, replace(TRAINING, seed=seed)).logits(batch, Draws(2)) for seed in (3, 3, 4)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_predicting_restores_the_mode(method, scorer, batch, llama):
    posterior = method.fit(llama(), scorer, TRAINING)
    for mode in (True, False):
        posterior.model.train(mode)
        predict(posterior, batch, 2)
        assert posterior.model.training is mode


def test_saved_and_loaded_draws_are_the_same(method, scorer, batch, llama, tmp_path):
    posterior = method.fit(llama(), scorer, TRAINING)
    loaded = load_posterior(llama(), save_posterior(posterior, tmp_path), scorer)
    assert type(loaded) is type(posterior)
    assert torch.equal(loaded.logits(batch, Draws(3)), posterior.logits(batch, Draws(3)))


def test_fitting_learns_the_training_rows(method, scorer, tiny_task, llama):
    posterior = method.fit(llama(), scorer, replace(TRAINING, steps=60, learning_rate=3e-2))
    batch = scorer.collate(scorer.encode(tiny_task.train))
    labels = batch.pop("labels")
    loss = -predict(posterior, batch, 0).probabilities[range(12), labels].log().mean()
    guessing = batch["option_mask"].sum(1).double().log().mean()
    assert loss < 0.85 * guessing


def test_methods_are_frozen(method):
    with pytest.raises(FrozenInstanceError):
        method.anything = 1


def test_blob_returns_a_spread_and_mle_a_point(scorer, batch, llama, tmp_path):
    spread = METHODS["blob"](final_std=0.15).fit(llama(), scorer, replace(TRAINING, steps=60, learning_rate=3e-2))
    assert isinstance(spread, Gaussian)
    assert predict(spread, batch, 8).mutual_information.max() > 1e-8
    folder = export_draw(spread.model, spread.draw(0), tmp_path)
    assert (folder / "adapter_model.safetensors").is_file()
    point = METHODS["mle"]().fit(llama(), scorer, TRAINING)
    assert isinstance(point, Point)
    assert predict(point, batch, 8).mutual_information.max() < 1e-12


def test_adding_a_method_is_one_class_and_one_entry(scorer, batch, llama, monkeypatch):
    from bayestune.training import start_adapter

    class Untrained:
        def fit(self, model, scorer, training):
            return Point(start_adapter(model, training), scorer)

    monkeypatch.setitem(METHODS, "untrained", Untrained)
    assert METHODS["untrained"]().fit(llama(), scorer, TRAINING).logits(batch, Draws(1)).shape == (1, 6, 4)
