from dataclasses import replace

import pytest

from bayestune.adapters import Lora
from bayestune.methods import TFB, BLoB, Laplace, PosteriorScale, Temperature
from bayestune.scoring import make_scorer
from promises import TRAINING, tokenizer

CHOOSING = [Temperature(), PosteriorScale(), Laplace(choose="held_out")]


def refused(case):
    """Held-out rows that a method must not choose on, and why."""
    renamed = replace(case.task.train[3], id="another")
    unlabelled = replace(case.task.held_out[0], answer=None)
    return {
        "chooses on held-out rows: got none, expected some": (),
        "seen in training: got 2 of 2, such as q0": case.task.train[:2],
        "got 1 of 2, such as another": (case.task.held_out[0], renamed),
        "got a row without one": (unlabelled,),
    }


@pytest.mark.parametrize("method", CHOOSING, ids=lambda method: type(method).__name__)
def test_rows_that_cannot_decide_are_refused(case, method):
    for words, rows in refused(case).items():
        task = replace(case.task, held_out=rows)
        scorer = make_scorer(case.make(), tokenizer(), task)
        with pytest.raises(ValueError, match=f"{type(method).__name__} .*{words}"):
            method.fit(case.make(), scorer, TRAINING)


@pytest.mark.parametrize("method", [BLoB(layers="last"), TFB(layers="last", anchors=4)])
def test_a_head_without_an_adapter_is_refused(case, method):
    with pytest.raises(ValueError, match="got a model whose head has none, expected one"):
        case.fit(method, lora=Lora(targets=("q_proj",)))
