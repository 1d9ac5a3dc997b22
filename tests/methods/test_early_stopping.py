import signal
from dataclasses import replace

import pytest
import torch

from bayestune import Refusal
from bayestune.decisions import predictive_nll
from bayestune.forward import Draws
from bayestune.methods import MLE, EarlyStopping
from bayestune.methods.early_stopping import KeepBest
from bayestune.methods.held_out import held_out_logits
from bayestune.training import Interrupted
from promises import LONG, TRAINING


def held_out_nll(posterior, case):
    logits, labels = held_out_logits(posterior, case.scorer, case.task.held_out, Draws(0))
    return predictive_nll(logits.double(), labels).item()


def test_the_least_held_out_nll_is_kept(case):
    posterior = case.fit(EarlyStopping(every=10), **LONG)
    losses = posterior.report.extra["nll_by_step"]
    assert list(losses) == [10, 20, 30, 40, 50, 60]
    assert posterior.report.extra["best_step"] == min(losses, key=losses.get)
    assert held_out_nll(posterior, case) == pytest.approx(min(losses.values()), abs=1e-6)


def test_the_run_is_that_of_maximum_likelihood(case):
    losses = case.fit(EarlyStopping(every=60), **LONG).report.extra["nll_by_step"]
    assert losses[60] == pytest.approx(held_out_nll(case.fit(MLE(), **LONG), case), abs=1e-6)


def test_the_last_step_is_measured_too(case):
    assert list(case.fit(EarlyStopping(every=7)).report.extra["nll_by_step"]) == [7, 8]


def test_a_resumed_run_knows_the_best_from_before(case, tmp_path):
    whole = case.fit(EarlyStopping(every=2), output=tmp_path, save_steps=4)
    resumed = case.fit(EarlyStopping(every=2), output=tmp_path, save_steps=4, resume=True)
    assert resumed.report.extra == whole.report.extra
    assert torch.equal(resumed.logits(case.batch, Draws(0)), whole.logits(case.batch, Draws(0)))


def test_what_cannot_be_measured_is_refused(case):
    with pytest.raises(Refusal, match=r"EarlyStopping.every: got 0, expected a whole number of 1"):
        EarlyStopping(every=0)
    scorer = replace(case.scorer, task=replace(case.task, held_out=()))
    with pytest.raises(Refusal, match="EarlyStopping chooses on held-out rows: got none"):
        EarlyStopping().fit(case.make(), scorer, TRAINING)


def test_a_resumed_run_takes_nothing_of_an_older_one(case, tmp_path, monkeypatch):
    case.fit(EarlyStopping(every=2), output=tmp_path, save_steps=4)
    other = {"learning_rate": 0.3, "output": tmp_path}
    with monkeypatch.context() as cut:
        cut.setattr(KeepBest, "on_step_end", lambda *_, **__: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Interrupted):
            case.fit(EarlyStopping(every=4), **other)
    resumed = case.fit(EarlyStopping(every=4), resume=True, **other)
    whole = case.fit(EarlyStopping(every=4), learning_rate=0.3)
    assert resumed.report.extra == whole.report.extra
    assert torch.equal(resumed.logits(case.batch, Draws(0)), whole.logits(case.batch, Draws(0)))
