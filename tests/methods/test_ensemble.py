from dataclasses import replace

import pytest
import torch

from bayestune import Refusal
from bayestune.forward import Draws
from bayestune.forward.verdicts import without_comparison
from bayestune.methods import MLE, BLoB, Distilled, Ensemble, Temperature
from bayestune.methods.recipes import make_method
from bayestune.posteriors import Mixture, predict
from bayestune.posteriors.posterior import Saved
from promises import TRAINING
from tiny import tiny_llama

WIDE = BLoB(prior_std=0.4, final_std=0.3, schedule="constant")


@pytest.mark.parametrize("base", [MLE(), BLoB()])
def test_an_ensemble_of_one_is_its_base(case, base):
    single = case.fit(base).logits(case.batch, Draws(3))
    assert torch.equal(case.fit(Ensemble(base, size=1)).logits(case.batch, Draws(3)), single)


def test_members_are_the_fits_of_their_seeds_and_run_in_one_pass(case):
    mixture = case.fit(Ensemble(MLE(), size=3, seed_step=7))
    fits = [case.fit(MLE(), seed=seed) for seed in (1, 8, 15)]
    alone = torch.cat([fit.logits(case.batch, Draws(1)) for fit in fits])
    passes = []
    hook = mixture.model.register_forward_pre_hook(lambda *_: passes.append(1))
    with without_comparison():
        logits = mixture.logits(case.batch, Draws(3))
    hook.remove()
    assert len(passes) == 1
    torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-5)
    averaged = alone.double().softmax(-1).mean(0)
    found = predict(mixture, case.batch, draws=10).probabilities
    torch.testing.assert_close(found, averaged, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="Mixture has no mean: got draws=0"):
        predict(mixture, case.batch, draws=0)


def test_an_ensemble_of_gaussians_takes_draws_of_each_member_in_turn(case):
    mixture = case.fit(Ensemble(WIDE, size=2))
    fits = [case.fit(WIDE, seed=seed) for seed in (1, 1001)]
    alone = torch.stack([fit.logits(case.batch, Draws(2)) for fit in fits], 1).flatten(0, 1)
    torch.testing.assert_close(mixture.logits(case.batch, Draws(4)), alone, atol=1e-5, rtol=1e-5)
    assert mixture.atoms is None


def test_members_with_heads_of_their_own_run_one_by_one(head):
    mixture = head.fit(Ensemble(MLE(), size=2))
    trainable = [name for name, p in mixture.model.named_parameters() if p.requires_grad]
    fits = [head.fit(MLE(), seed=seed) for seed in (1, 1001)]
    alone = torch.cat([fit.logits(head.batch, Draws(1)) for fit in fits])
    torch.testing.assert_close(mixture.logits(head.batch, Draws(2)), alone, atol=1e-6, rtol=1e-5)
    assert mixture.model.active_adapter == "default"
    assert [name for name, p in mixture.model.named_parameters() if p.requires_grad] == trainable


def test_finished_members_are_kept_when_a_fit_goes_on(case, tmp_path, monkeypatch):
    first = case.fit(Ensemble(size=2), output=tmp_path)
    fits = []
    plain = MLE.fit
    monkeypatch.setattr(MLE, "fit", lambda self, *given: fits.append(1) or plain(self, *given))
    (tmp_path / "member-1" / "posterior.json").unlink()
    again = case.fit(Ensemble(size=2), output=tmp_path, resume=True)
    assert len(fits) == 1
    assert torch.equal(again.logits(case.batch, Draws(2)), first.logits(case.batch, Draws(2)))


def test_the_report_sums_the_members_and_holds_the_largest_peak(case, tmp_path, monkeypatch):
    peaks = iter([30.0, 20.0])
    monkeypatch.setattr("bayestune.training.meter.peak_memory_mb", lambda: next(peaks))
    report = case.fit(Ensemble(size=2)).report
    assert report.steps == 16
    assert report.peak_memory_mb == 30.0
    assert len([line for line in report.history if "loss" in line]) == 16


def test_mixtures_that_make_no_sense_are_refused(case):
    point = case.fit(MLE())
    message = r"each with its own adapter: got the adapters \['default', 'default'\] on 1"
    with pytest.raises(ValueError, match=message):
        Mixture([point, point])
    with pytest.raises(ValueError, match="an ensemble needs members: got size=0"):
        Ensemble(size=0)
    with pytest.raises(NotImplementedError, match="loaded member by member"):
        Mixture.restore(Saved(point.model, case.scorer, {}, {}, "default"))
    with pytest.raises(ValueError, match="Tempered draws are not adapters: got a mixture of them"):
        case.fit(Ensemble(base=Temperature(), size=1)).draw(0)


def test_members_of_another_base_are_not_kept(case, tmp_path, monkeypatch):
    case.fit(Ensemble(WIDE, size=2), output=tmp_path)
    with pytest.raises(Refusal, match=r"base.method: got 'MLE', the fit has 'BLoB'"):
        case.fit(Ensemble(MLE(), size=2), output=tmp_path, resume=True)
    assert len(case.fit(Ensemble(WIDE, size=3), output=tmp_path, resume=True).members) == 3
    fit = MLE.fit
    fits = []

    def cut(self, *given):
        fits.append(1)
        if len(fits) == 2:
            raise KeyboardInterrupt
        return fit(self, *given)

    monkeypatch.setattr(MLE, "fit", cut)
    with pytest.raises(KeyboardInterrupt):
        case.fit(Ensemble(MLE(), size=2), output=tmp_path)
    resumed = case.fit(Ensemble(MLE(), size=2), output=tmp_path, resume=True)
    assert len(fits) == 3
    whole = case.fit(Ensemble(MLE(), size=2))
    assert torch.equal(resumed.logits(case.batch, Draws(2)), whole.logits(case.batch, Draws(2)))


def test_members_of_other_lengths_rows_or_models_are_not_kept(case, tmp_path):
    method, training = Ensemble(size=1), replace(TRAINING, output=tmp_path)
    method.fit(case.make(), case.scorer, training)
    again = replace(training, resume=True)
    short = replace(case.scorer, max_length=40)
    with pytest.raises(Refusal, match="max_length: got 40, the fit has"):
        method.fit(case.make(), short, again)
    spare = replace(case.task, unlabelled=case.task.evaluation)
    with pytest.raises(Refusal, match="the unlabelled rows: got"):
        method.fit(case.make(), replace(case.scorer, task=spare), again)
    with pytest.raises(Refusal, match="the base model: got"):
        method.fit(tiny_llama(num_hidden_layers=3), case.scorer, again)
    retrained = case.make()
    with torch.no_grad():
        retrained.lm_head.weight.mul_(1.01)
    with pytest.raises(Refusal, match="the base model's weights: got"):
        method.fit(retrained, case.scorer, again)


def test_a_fit_that_starts_anew_goes_on_with_its_own_parts(case, tmp_path, monkeypatch):
    """Whatever an older fit of another base left in its members' folders."""
    case.fit(Ensemble(Temperature(Distilled(WIDE, steps=2)), size=2), output=tmp_path)
    other = Ensemble(Temperature(Distilled(replace(WIDE, prior_std=0.5), steps=2)), size=2)
    fit = BLoB.fit
    with monkeypatch.context() as cut:
        cut.setattr(BLoB, "fit", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            case.fit(other, output=tmp_path)
    assert BLoB.fit is fit
    resumed = case.fit(other, output=tmp_path, resume=True)
    whole = case.fit(other)
    assert torch.equal(resumed.logits(case.batch, Draws(2)), whole.logits(case.batch, Draws(2)))


def _interrupted(*given):
    raise KeyboardInterrupt


def test_a_base_that_sets_the_seed_would_make_all_members_alike():
    seeded = {"method": "mle", "training": {"seed": 3}}
    for base in (seeded, {"method": "temperature", "base": seeded}):
        with pytest.raises(Refusal, match="got a base whose training sets `seed`, which makes"):
            make_method({"method": "ensemble", "size": 2, "base": base})
    make_method({"method": "ensemble", "size": 1, "base": seeded})
