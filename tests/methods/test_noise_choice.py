from collections import Counter
from dataclasses import replace

import pytest
import torch

from bayestune import KLStep, Refusal
from bayestune.forward import Draws
from bayestune.methods import MLE, AuthorsBLoB, BLoB
from bayestune.methods.held_out import held_out_logits
from bayestune.methods.noise_choice import Candidate, CrossFit, choose
from bayestune.posteriors import Point
from promises import TRAINING, Case


@pytest.fixture(scope="module")
def whole(case):
    """The case with twice as many rows to train on, so that some can be left out."""
    train = case.task.train
    others = tuple(replace(row, id=f"{row.id}b", question=f"say {row.question}") for row in train)
    wide = Case("letter")
    wide.scorer = replace(case.scorer, task=replace(case.task, train=(*train, *others)))
    return wide


def losses_of(means, spread=0.0):
    """Nats of ten rows around a mean for each candidate, of which the first is the usual one."""
    swing = torch.linspace(-1, 1, 10, dtype=torch.float64)

    def losses(candidate):
        mean = means.get(candidate, 9.0)
        return torch.full((10,), mean, dtype=torch.float64) + (candidate != Candidate()) * (
            spread * swing
        )

    return losses


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        ({}, Candidate()),
        ({Candidate(1, 0.5): 8.0}, Candidate(1, 0.5)),
        ({Candidate(1, 0.5): 8.0, Candidate(1, 0.25): 7.0}, Candidate(1, 0.25)),
        ({Candidate(2, 1): 8.0}, Candidate(2, 1)),
        ({Candidate(2, 1): 8.0, Candidate(4, 1): 7.0}, Candidate(4, 1)),
        ({Candidate(0.5, 1): 8.0, Candidate(0.25, 1): 8.5}, Candidate(0.5, 1)),
        ({Candidate(1, 0.5): 8.0, Candidate(2, 0.5): 7.0}, Candidate(2, 0.5)),
        ({Candidate(4, 1): 1.0}, Candidate()),  # beyond one that is worse: not tried
    ],
)
def test_the_search_goes_on_while_it_is_better(means, expected):
    assert choose(losses_of(means))[0] == expected


def test_a_gain_within_its_standard_error_changes_nothing():
    means = {Candidate(1, 0.5): 8.9}
    swing = torch.linspace(-1, 1, 10).std().item() / 10**0.5
    assert choose(losses_of(means, spread=1.1 * 0.1 / swing))[0] == Candidate()
    assert choose(losses_of(means, spread=0.9 * 0.1 / swing))[0] == Candidate(1, 0.5)


class Watched:
    """A method that remembers what its fits were given."""

    def __init__(self):
        self.fits = []

    def __call__(self, factor):
        self.factor = factor
        return self

    def fit(self, model, scorer, training):
        self.fits.append((self.factor, scorer.task.train, training.steps))
        return MLE().fit(model, scorer, training)


def test_every_row_is_asked_once_of_a_fit_that_has_not_seen_it(case):
    train = (*case.task.train, replace(case.task.train[0], id="again"))
    scorer = replace(case.scorer, task=replace(case.task, train=train))
    watched = Watched()
    still = replace(TRAINING, learning_rate=0.0, steps=40)
    crossed = CrossFit(watched, case.make(), scorer, still)
    losses = crossed.losses(Candidate(2.0, 0.5))
    (factor, first, steps), (_, second, _) = watched.fits
    assert factor == 2.0
    contents = [{row.fingerprint for row in part} for part in (first, second)]
    assert not contents[0] & contents[1]  # two parts, and equal rows in one of them
    assert Counter(row.id for row in (*first, *second)) == Counter(row.id for row in train)
    assert steps == round(20 * len(first) / len(train))
    posterior = Point(MLE().fit(case.make(), scorer, still).model, scorer)
    logits, labels = held_out_logits(posterior, scorer, train, Draws(0))
    expected = -logits[0].double().log_softmax(-1)[torch.arange(len(train)), labels]
    torch.testing.assert_close(losses.sort()[0], expected.sort()[0], rtol=0, atol=1e-6)


def test_auto_ends_at_what_it_chose(whole):
    posterior = whole.fit(BLoB(final_std="auto"), steps=12)
    said = posterior.report.extra["noise_choice"]
    factor, length = (float(part.split(" ×")[0]) for part in said.split(" and "))
    stds = [slot.root_std.square().mean() for slot in posterior.layers().values()]
    assert torch.stack(stds).mean().item() == pytest.approx(0.1 * factor, rel=0.05)
    assert posterior.report.steps == round(12 * length)
    tried = posterior.report.extra["cross_fitted_nll"]
    assert said in tried
    assert len(tried) >= 3


def test_a_resumed_choice_asks_for_nothing_twice(whole, tmp_path):
    first = CrossFit(Watched(), whole.make(), whole.scorer, TRAINING, {}, tmp_path)
    expected = first.losses(Candidate())
    known = dict(first.known)
    again = CrossFit(Watched(), whole.make(), whole.scorer, TRAINING, known, tmp_path)
    assert torch.equal(again.losses(Candidate()), expected)
    assert again.method.fits == []
    posterior = whole.fit(BLoB(final_std="auto"), output=tmp_path, resume=True)
    tried = posterior.report.extra["cross_fitted_nll"]
    assert tried["1 × noise and 1 × steps"] == expected.mean().item()


def test_losses_of_another_prior_choose_nothing(whole, tmp_path, monkeypatch):
    def cut(self, candidate):
        self.known["1 × noise and 1 × steps"] = [0.0] * 24
        self._keep()
        raise KeyboardInterrupt

    auto = BLoB(final_std="auto")
    with monkeypatch.context() as broken:
        broken.setattr(CrossFit, "losses", cut)
        with pytest.raises(KeyboardInterrupt):
            whole.fit(auto, output=tmp_path)
    with pytest.raises(Refusal, match=r"prior_std: got 0.8, the fit has 0.2"):
        whole.fit(replace(auto, prior_std=0.8), output=tmp_path, resume=True)

    def asked(self, candidate):
        assert not self.known
        raise KeyboardInterrupt

    monkeypatch.setattr(CrossFit, "losses", asked)
    with pytest.raises(KeyboardInterrupt):
        whole.fit(replace(auto, prior_std=0.8), output=tmp_path)


def test_a_fit_that_starts_anew_goes_on_with_its_own_checkpoints(whole, tmp_path, monkeypatch):
    older = whole.fit(BLoB(), output=tmp_path, save_steps=4)
    auto = BLoB(final_std="auto")
    with monkeypatch.context() as broken:
        broken.setattr(CrossFit, "losses", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            whole.fit(auto, output=tmp_path, steps=16)
    monkeypatch.setattr(CrossFit, "losses", losses_of_the_usual)
    resumed = whole.fit(auto, output=tmp_path, steps=16, resume=True)
    fresh = whole.fit(auto, steps=16)
    assert older.report.steps == 8
    draws = Draws(2)
    assert torch.equal(resumed.logits(whole.batch, draws), fresh.logits(whole.batch, draws))


def losses_of_the_usual(_, candidate):
    """The usual noise and length are the best."""
    return torch.full((24,), 1.0 if candidate == Candidate() else 2.0, dtype=torch.float64)


def _interrupted(*given):
    raise KeyboardInterrupt


def test_what_cannot_be_chosen_is_refused(case):
    few = replace(case.scorer, task=replace(case.task, train=case.task.train[:3]))
    with pytest.raises(Refusal, match="leaves training rows out to choose by: got 3 rows"):
        BLoB(final_std="auto").fit(case.make(), few, TRAINING)
    with pytest.raises(Refusal, match=r"expected neither kl_lr nor bursts"):
        BLoB(final_std="auto", kl_lr=0.01)
    with pytest.raises(Refusal, match=r"expected neither kl_lr nor bursts"):
        AuthorsBLoB(final_std="auto")
    with pytest.raises(Refusal, match=r"must be a number here: got 'auto'"):
        KLStep(final_std="auto")
