"""What records say of classes, and bars on it."""

import pytest
import torch

from bayestune import Question
from bayestune.evaluation import Bar
from bayestune.evaluation.gates import class_record

NAMES = ("red", "green", "blue")
P = torch.tensor([[0.95, 0.05, 0.0], [0.2, 0.7, 0.1], [0.92, 0.05, 0.03], [0.1, 0.2, 0.7]])


def rows(answers, options=NAMES):
    return [Question(str(i), "?", options, answer) for i, answer in enumerate(answers)]


def test_classes_by_hand():
    found = class_record(P, rows([0, 1, 1, 1]))
    assert found is not None
    assert found["confusion"] == [[1, 0, 0], [1, 1, 1], [0, 0, 0]]
    red, green, blue = found["classes"]
    assert red == {
        "name": "red",
        "rows": 1,
        "chosen": 2,
        "precision": 0.5,
        "recall": 1.0,
        "f1": pytest.approx(2 / 3),
        "wrong_at_90": 1,
    }
    assert (green["precision"], green["recall"], green["f1"]) == (1.0, pytest.approx(1 / 3), 0.5)
    assert (blue["precision"], blue["recall"], blue["f1"]) == (0.0, None, 0.0)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 0.5 + 0) / 3)


def test_classes_are_told_by_their_names_in_whatever_order():
    turned = rows([0, 1, 1, 1])
    probabilities = P.clone()
    for i in (1, 3):
        turned[i] = turned[i].with_options(NAMES[::-1])
        probabilities[i] = P[i].flip(0)
    assert class_record(probabilities, turned) == class_record(P, rows([0, 1, 1, 1]))


def test_rows_of_unlike_options_have_no_classes():
    mixed = [*rows([0, 1, 1]), Question("3", "?", ("red", "green", "sky"), 1)]
    assert class_record(P, mixed) is None
    fewer = [*rows([0, 1, 1]), Question("3", "?", ("red", "green"), 1)]
    assert class_record(P, fewer) is None
    twice = rows([0, 0, 0, 0], ("red", "green", "green"))
    assert class_record(P, twice) is None


def test_a_bar_on_macro_f1():
    record = {"label": "MLE", "metrics": {}, "gate": {}, "by_class": {"macro_f1": 0.4}}
    assert Bar.of("macro_f1>=0.4").holds(record)
    assert not Bar.of("macro_f1>0.4").holds(record)
    del record["by_class"]
    assert not Bar.of("macro_f1>=0").holds(record)


def test_a_bar_is_read_however_it_is_spelt():
    plain = Bar.of("nll<=0.7")
    for text in ("NLL<=0.7", " nll <= 0.70 ", "nll≤0.7", "Nll<=7e-1"):
        assert Bar.of(text) == plain
    assert Bar.of("Wrong_at_0.9≥2") == Bar("wrong_at_90", ">=", 2)
    assert Bar.of("accuracy>1").bound == 1


@pytest.mark.parametrize("name", ["ece", "risk", "acted", "accuracy", "macro_f1", "cost"])
def test_a_share_is_no_number_of_percent(name):
    """ECE <= 5 would always hold."""
    with pytest.raises(ValueError, match=r"expected a share from 0 to 1.*; write 0\.05 for 5 %"):
        Bar.of(f"{name}<=5")
