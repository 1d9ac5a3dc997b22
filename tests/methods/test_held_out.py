from dataclasses import replace

import pytest

from bayestune import Refusal
from bayestune.adapters import Lora, Slots
from bayestune.data import Question, own_task
from bayestune.methods import (
    TFB,
    BLoB,
    Distilled,
    Ensemble,
    Laplace,
    MCDropout,
    PosteriorScale,
    Temperature,
    check_method,
)
from bayestune.methods.held_out import held_out_rows
from bayestune.scoring import make_scorer
from bayestune.training import start_adapter
from promises import TRAINING, tokenizer

CHOOSING = [Temperature(), PosteriorScale(), Laplace(choose="held_out")]


def refused(case):
    """Held-out rows that a method must not choose on, and why."""
    renamed = replace(case.task.train[3], id="another")
    turned = case.task.train[4].with_options(case.task.train[4].options[::-1])
    unlabelled = replace(case.task.held_out[0], answer=None)
    return {
        "chooses on held-out rows: got none, expected some": (),
        "seen in training: got 2 of 2, such as q0": case.task.train[:2],
        "got 1 of 2, such as another": (case.task.held_out[0], renamed),
        f"got 1 of 1, such as {turned.id}": (turned,),
        "got a row without one": (unlabelled,),
    }


@pytest.mark.parametrize("method", CHOOSING, ids=lambda method: type(method).__name__)
def test_rows_that_cannot_decide_are_refused(case, method):
    for words, rows in refused(case).items():
        task = replace(case.task, held_out=rows)
        scorer = make_scorer(case.make(), tokenizer(), task)
        with pytest.raises(ValueError, match=f"{type(method).__name__} .*{words}"):
            method.fit(case.make(), scorer, TRAINING)


STUDENT = Distilled(steps=2)
LEARNING = [Temperature(STUDENT), PosteriorScale(TFB(STUDENT)), Laplace(STUDENT, choose="held_out")]


@pytest.mark.parametrize("method", LEARNING, ids=lambda method: type(method).__name__)
def test_rows_that_a_student_learnt_decide_nothing(case, method, caplog):
    learnt = [replace(row, id=f"u{row.id}", answer=None) for row in case.task.held_out]
    scorer = make_scorer(case.make(), tokenizer(), replace(case.task, unlabelled=tuple(learnt)))
    adapted = Slots(start_adapter(case.make(), TRAINING))
    with pytest.raises(Refusal, match="rows that its base may learn: got 4 held-out rows, all"):
        method.fit(case.make(), scorer, TRAINING)
    with pytest.raises(Refusal, match="rows that its base may learn: got 4 held-out rows, all"):
        check_method(method, scorer, adapted)
    check_method(Distilled(Temperature()), scorer, adapted)  # its teacher has not learnt them
    some = make_scorer(case.make(), tokenizer(), replace(case.task, unlabelled=(learnt[1],)))
    left = held_out_rows(some, "Temperature", some.task.unlabelled)
    assert [row.id for row in left] == [case.task.held_out[i].id for i in (0, 2, 3)]
    assert "Temperature leaves out 1 of 4 held-out rows" in caplog.text


@pytest.mark.parametrize("method", [BLoB(layers="last"), TFB(layers="last", anchors=4)])
def test_a_head_without_an_adapter_is_refused(case, method):
    with pytest.raises(ValueError, match="got a model whose head has none, expected one"):
        case.fit(method, lora=Lora(targets=("q_proj",)))


def test_a_row_and_its_twin_of_another_order_are_not_parted():
    row = Question("a", "what is red?", ("red", "green"), 0)
    others = [replace(row, id=f"{i}", question=f"what is {i}?") for i in range(40)]
    twins = [replace(one.with_options(("green", "red")), id=f"t{one.id}") for one in others]
    task = own_task("mine", (*others, *twins), ()).subset(holdout=0.5, seed=3)
    seen = {one.fingerprint for one in task.train}
    assert task.held_out
    assert not [one for one in task.held_out if one.fingerprint in seen]


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (MCDropout(base=BLoB()), "MCDropout builds on a point"),
        (MCDropout(base=Distilled()), "whose student is trained without dropout"),
        (Ensemble(base=Ensemble()), "Ensemble saves its members as adapters"),
        (Ensemble(base=Temperature(Ensemble())), "Ensemble saves its members as adapters"),
        (TFB(base=Temperature()), r"put the temperature around it, Temperature\(base=TFB"),
        (Temperature(base=Ensemble(), draws=0), "got draws=0 and a base without a mean"),
        (Temperature(Temperature(Ensemble()), draws=0), "got draws=0 and a base without a mean"),
    ],
)
def test_a_base_that_a_method_cannot_build_on_is_refused_before_it_is_fitted(case, method, said):
    with pytest.raises(Refusal, match=said):
        check_method(method, case.scorer, Slots(start_adapter(case.make(), TRAINING)))


def test_a_scale_of_the_mean_is_refused():
    with pytest.raises(Refusal, match="PosteriorScale.draws: got 0"):
        PosteriorScale(draws=0)
