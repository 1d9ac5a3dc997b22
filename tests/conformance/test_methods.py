"""One suite over all methods: what a method and its posterior promise, whichever it is."""

import importlib
from dataclasses import FrozenInstanceError

import pytest
import torch
from peft import PeftModel

import bayestune.methods
from bayestune.adapters import detach
from bayestune.forward import Draws
from bayestune.methods import METHODS, MLE, Distilled, Ensemble
from bayestune.posteriors import Point, export_draw, load_posterior, predict, save_posterior
from promises import LONG, Case, exportable, learnt, resumes

WITHOUT_SPREAD = {"mle", "map", "temperature", "early_stopping", "distilled"}
LEARN_LITTLE = {"bbb", "scalabl", "temperature", "early_stopping", "distilled"}
SETTINGS = {
    "tfb": {"anchors": 6, "draws": 2, "evaluations": 3},
    "posterior_scale": {"factors": (0.5, 1.0)},
    "ivon": {"learning_rate": 12.0},  # the published steps are too small for sixty of them to show
    "swag": {"rate": 1.0, "every": 1},
    "dalorra": {"init_kept": 0.9},
    "distilled": {"base": MLE(), "steps": 60, "learning_rate": 1e-2},
}


SCORINGS = ["letter", "head", pytest.param("text", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=SCORINGS)
def case(request):
    return Case(request.param)


@pytest.fixture(scope="module", params=METHODS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def method(name):
    return METHODS[name](**SETTINGS.get(name, {}))


@pytest.fixture(scope="module")
def posterior(method, case):
    return case.fit(method)


def test_draws_are_finite_where_a_row_has_an_option(posterior, case):
    logits = posterior.logits(case.batch, Draws(3))
    options = torch.tensor([len(row.options) for row in case.task.evaluation])
    assert logits.shape == (3, 6, options.max())
    assert torch.equal(logits.isfinite().all(0), torch.arange(options.max()) < options[:, None])
    sums = predict(posterior, case.batch, 3).probabilities.sum(-1)
    torch.testing.assert_close(sums, torch.ones(6, dtype=torch.float64))


def test_the_report_says_what_the_fit_took(posterior):
    assert posterior.report.steps >= 8
    assert posterior.report.seconds > 0
    assert posterior.report.peak_memory_mb > 0
    assert "loss" in posterior.report.history[0]


def test_the_same_seed_gives_the_same_fit_another_one_another(method, case):
    fits = [case.fit(method, seed=seed) for seed in (3, 3, 4)]
    first, second, other = (fit.logits(case.batch, Draws(2)) for fit in fits)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_the_bases_weights_are_bit_identical_afterwards(method, case):
    before = case.make().state_dict()
    after = detach(case.fit(method).model).state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_predicting_restores_the_mode(posterior, case):
    for mode in (True, False):
        posterior.model.train(mode)
        predict(posterior, case.batch, 2)
        assert posterior.model.training is mode


def test_saved_and_loaded_draws_are_the_same(method, case, tmp_path):
    posterior = case.fit(method)  # a model that has run already may reuse a prefix: other last bits
    loaded = load_posterior(case.make(), save_posterior(posterior, tmp_path), case.scorer)
    assert type(loaded) is type(posterior)
    for draws in (Draws(3), Draws(0)) if posterior.has_mean else (Draws(3),):
        logits = posterior.logits(case.batch, draws)
        assert torch.equal(loaded.logits(case.batch, draws), logits)


def test_a_long_fit_learns_the_training_rows_and_draws_differ_unless_it_is_a_point(
    name, method, case
):
    posterior = case.fit(method, **LONG)
    assert learnt(posterior, case) < (0.97 if name in LEARN_LITTLE else 0.85)
    spread = posterior.logits(case.batch, Draws(3)).nan_to_num(neginf=0).var(0).max()
    assert spread == 0 if name in WITHOUT_SPREAD else spread > 0


def test_a_draw_exports_as_a_plain_adapter_with_its_logits_or_is_refused(posterior, case, tmp_path):
    if exportable(posterior):
        plain = PeftModel.from_pretrained(case.make(), export_draw(posterior, 1, tmp_path))
        exported = Point(plain, case.scorer).logits(case.batch, Draws(0))[0]
        expected = posterior.logits(case.batch, Draws(2))[1]
        torch.testing.assert_close(exported, expected, atol=1e-5, rtol=1e-5)
    else:
        with pytest.raises(ValueError, match="draws are not adapters: got draw 1, expected"):
            export_draw(posterior, 1, tmp_path)


def test_a_resumed_run_ends_bit_by_bit_as_the_whole_one(method, tmp_path):
    if isinstance(method, Ensemble | Distilled):
        pytest.skip("its parts resume one by one: see test_ensemble and test_distilled")
    assert resumes(method, Case("letter"), tmp_path)


def test_methods_are_frozen_and_exported(method):
    with pytest.raises(FrozenInstanceError):
        method.anything = 1
    assert type(method).__name__ in bayestune.methods.__all__


def test_adding_a_method_is_one_file_and_one_entry(case, monkeypatch, tmp_path):
    (tmp_path / "untrained.py").write_text(TOY, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(METHODS, "untrained", importlib.import_module("untrained").Untrained)
    posterior = case.fit(METHODS["untrained"](scale=2.0))
    assert predict(posterior, case.batch).probabilities.shape[0] == 6
    folder = save_posterior(posterior, tmp_path / "saved")
    assert load_posterior(case.make(), folder, case.scorer).kind == "point"


TOY = """
from dataclasses import dataclass

from bayestune.posteriors import Point
from bayestune.training import start_adapter


@dataclass(frozen=True)
class Untrained:
    scale: float = 1.0

    def fit(self, model, scorer, training):
        return Point(start_adapter(model, training), scorer)
"""
