from dataclasses import dataclass

import pytest

from bayestune.adapters import Lora
from bayestune.methods import (
    METHODS,
    MLE,
    TFB,
    BLoB,
    Ensemble,
    WithTraining,
    changed,
    described,
    make_method,
)
from bayestune.training import Training

ENTRIES = {
    "mle": None,
    "wide": {"method": "blob", "prior_std": 0.5, "training": {"learning_rate": 1e-3}},
    "pair": {"method": "ensemble", "base": "wide", "size": 2},
}


@pytest.mark.parametrize(
    ("settings", "name", "method"),
    [
        (None, "mle", MLE()),
        ("mle", "", MLE()),
        ({"method": "mle"}, "", MLE()),
        ({"prior_std": 0.5}, "blob", BLoB(prior_std=0.5)),
        ({"method": "tfb", "base": {"method": "mle"}, "draws": 3}, "", TFB(base=MLE(), draws=3)),
        ({}, "tfb", TFB()),
    ],
)
def test_settings_become_the_method(settings, name, method):
    assert make_method(settings, name=name) == method


def test_a_base_is_another_entry_before_it_is_a_method():
    wide = WithTraining(BLoB(prior_std=0.5), {"learning_rate": 1e-3})
    assert make_method("pair", ENTRIES) == Ensemble(base=wide, size=2)
    entries = {"mle": {"method": "blob"}}
    assert make_method({"method": "tfb", "base": "mle"}, entries) == TFB(base=BLoB())


@pytest.mark.parametrize("name", ENTRIES)
def test_a_method_describes_itself_as_settings_that_make_it(name):
    method = make_method(ENTRIES[name], ENTRIES, name=name)
    assert make_method(described(method)) == method


def test_training_is_changed_where_the_settings_say_so(monkeypatch):
    seen = []
    monkeypatch.setattr(BLoB, "fit", lambda self, model, scorer, training: seen.append(training))
    make_method("wide", ENTRIES).fit(None, None, Training(steps=7))
    assert seen == [Training(steps=7, learning_rate=1e-3)]


def test_a_nested_dataclass_changes_in_part():
    training = Training(Lora(rank=2, dropout=0.1), steps=3)
    lora = Lora(rank=2, dropout=0.1, targets=("q_proj",))
    found = changed(training, {"lora": {"targets": ["q_proj"]}, "bf16": True})
    assert found == Training(lora, steps=3, bf16=True)
    assert changed(training, {}) is training
    message = "unknown settings of Training: got .'step'., expected some of"
    with pytest.raises(ValueError, match=message):
        changed(training, {"step": 1})


@dataclass(frozen=True)
class Needs:
    base: object


REFUSED = [
    ("sgd", r"unknown method: got 'sgd', expected one of \['bbb', 'blob'.*set `method`"),
    ({"prior_std": 1}, "unknown method: got 'other', expected one of"),
    (
        {"method": "blob", "prior": 1},
        r"unknown settings of BLoB: got \['prior'\], expected some of \['final_std'.*name",
    ),
    (
        {"method": "mle", "base": "blob"},
        r"unknown settings of MLE: got \['base'\], expected some of \[\]",
    ),
    (
        {"method": "blob", "prior_std": "wide"},
        "settings of BLoB: got .*'wide'.*expected values of its fields' types",
    ),
    (
        {"method": "tfb", "base": "other"},
        "its own base: got other → other, expected a chain that ends; rename",
    ),
    ({"method": "tfb", "base": "loop"}, "its own base: got other → loop → loop"),
    (
        {"method": "needs"},
        r"Needs needs a base: got \{\}, expected `base`, a method's name or settings; add it",
    ),
]


@pytest.mark.parametrize(("settings", "match"), REFUSED)
def test_bad_settings_are_refused(settings, match, monkeypatch):
    monkeypatch.setitem(METHODS, "needs", Needs)
    entries = {"other": settings, "loop": {"method": "tfb", "base": "loop"}}
    with pytest.raises(ValueError, match=match):
        make_method(settings, entries, name="other")
