"""One suite over all methods: what a method and its posterior promise, whichever it is."""

import importlib
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from peft import PeftModel

from bayestune.adapters import detach
from bayestune.forward import Draws
from bayestune.methods import METHODS
from bayestune.posteriors import Point, export_draw, load_posterior, predict, save_posterior
from bayestune.scoring import make_scorer
from bayestune.training import Training

TRAINING = Training(steps=8, learning_rate=1e-2, progress=False)
POINTS = {"mle", "map"}
WITHOUT_SPREAD = POINTS | {"temperature"}
EXPORTABLE = set(METHODS) - {"mc_dropout", "temperature", "laplace", "blob_authors"}
SETTINGS = {
    "tfb": {"anchors": 6, "draws": 2, "evaluations": 3},
    "posterior_scale": {"factors": (0.5, 1.0)},
    "ivon": {"learning_rate": 12.0},  # the published steps are too small for sixty of them to show
    "swag": {"rate": 1.0, "every": 1},
    "dalorra": {"init_kept": 0.9},
}


def make(name):
    return METHODS[name](**SETTINGS.get(name, {}))


@pytest.fixture(params=sorted(METHODS))
def name(request):
    return request.param


@pytest.fixture
def method(name):
    return make(name)


@pytest.fixture(params=["letter", "text", "head"])
def scoring(request):
    return request.param


@pytest.fixture
def base(scoring, llama, bert):
    """Makes the model that the scoring needs: a language model, or an encoder with a head."""
    return bert if scoring == "head" else llama


@pytest.fixture
def task(scoring, tiny_task, labelled_task):
    return labelled_task if scoring == "head" else tiny_task


@pytest.fixture
def scorer(base, byte_level, task, scoring):
    return make_scorer(base(), byte_level, task, scoring)


@pytest.fixture
def batch(scorer, task):
    batch = scorer.collate(scorer.encode(task.evaluation))
    batch.pop("labels")
    return batch


def test_fit_returns_a_posterior_with_finite_draws(method, scorer, batch, base, task):
    posterior = method.fit(base(), scorer, TRAINING)
    logits = posterior.logits(batch, Draws(3))
    options = torch.tensor([len(row.options) for row in task.evaluation])
    assert logits.shape == (3, 6, options.max())
    assert torch.equal(logits.isfinite().all(0), torch.arange(options.max()) < options[:, None])
    prediction = predict(posterior, batch, 3)
    torch.testing.assert_close(prediction.probabilities.sum(-1), torch.ones(6, dtype=torch.float64))
    assert posterior.fitted["steps"] >= 8
    assert posterior.fitted["seconds"] > 0
    assert posterior.fitted["peak_memory_mb"] > 0


def test_the_bases_weights_are_bit_identical_afterwards(method, scorer, base):
    plain = base()
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    posterior = method.fit(plain, scorer, TRAINING)
    after = detach(posterior.model).state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_same_seed_same_fit(method, scorer, batch, base):
    first, second, other = (
        method.fit(base(), scorer, replace(TRAINING, seed=seed)).logits(batch, Draws(2))
        for seed in (3, 3, 4)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_predicting_restores_the_mode(method, scorer, batch, base):
    posterior = method.fit(base(), scorer, TRAINING)
    for mode in (True, False):
        posterior.model.train(mode)
        predict(posterior, batch, 2)
        assert posterior.model.training is mode


def test_saved_and_loaded_draws_are_the_same(method, scorer, batch, base, tmp_path):
    posterior = method.fit(base(), scorer, TRAINING)
    loaded = load_posterior(base(), save_posterior(posterior, tmp_path), scorer)
    assert type(loaded) is type(posterior)
    assert torch.equal(loaded.logits(batch, Draws(3)), posterior.logits(batch, Draws(3)))


def test_fitting_learns_the_training_rows(name, method, scorer, task, base):
    posterior = method.fit(base(), scorer, replace(TRAINING, steps=60, learning_rate=3e-2))
    batch = scorer.collate(scorer.encode(task.train))
    labels = batch.pop("labels")
    loss = (
        -predict(posterior, batch, 0 if posterior.has_mean else 3)
        .probabilities[range(12), labels]
        .log()
        .mean()
    )
    guessing = torch.tensor([len(row.options) for row in task.train]).double().log().mean()
    assert loss < (0.97 if name in ("bbb", "temperature") else 0.85) * guessing


def test_draws_differ_unless_the_posterior_is_a_point(name, method, scorer, batch, base):
    posterior = method.fit(base(), scorer, replace(TRAINING, steps=60, learning_rate=3e-2))
    spread = posterior.logits(batch, Draws(3)).nan_to_num(neginf=0).var(0).max()
    assert spread == 0 if name in WITHOUT_SPREAD else spread > 0


def test_a_draw_exports_as_a_plain_adapter_with_that_draws_logits(
    name, method, scorer, batch, base, tmp_path
):
    if name not in EXPORTABLE:
        pytest.skip("its draws are no adapters")
    posterior = method.fit(base(), scorer, TRAINING)
    plain = PeftModel.from_pretrained(
        base(), export_draw(posterior.model, posterior.draw(1), tmp_path)
    )
    expected = posterior.logits(batch, Draws(2))[1]
    if scorer.task.name == "labelled" and name == "ensemble":
        return  # its members have heads of their own, which an export of the first one's does not hold
    torch.testing.assert_close(
        Point(plain, scorer).logits(batch, Draws(0))[0], expected, atol=1e-5, rtol=1e-5
    )


def test_methods_are_frozen(method):
    with pytest.raises(FrozenInstanceError):
        method.anything = 1


def test_adding_a_method_is_one_file_and_one_entry(scorer, batch, base, monkeypatch, tmp_path):
    (tmp_path / "untrained.py").write_text(TOY, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(METHODS, "untrained", importlib.import_module("untrained").Untrained)
    posterior = METHODS["untrained"](scale=2.0).fit(base(), scorer, TRAINING)
    assert predict(posterior, batch).probabilities.shape[0] == 6
    assert (
        load_posterior(base(), save_posterior(posterior, tmp_path / "saved"), scorer).kind
        == "point"
    )


TOY = """
from dataclasses import dataclass

from bayestune.forms import Point
from bayestune.training import start_adapter


@dataclass(frozen=True)
class Untrained:
    scale: float = 1.0

    def fit(self, model, scorer, training):
        return Point(start_adapter(model, training), scorer, {"seconds": 0.0, "steps": 0})
"""
