import pytest
import torch

from bayestune.decisions import best_temperature, predictive_nll
from bayestune.forward import Draws
from bayestune.methods import MLE, BLoB, PosteriorScale, Temperature
from bayestune.posteriors import load_posterior, save_posterior
from bayestune.runtime import keep_freed_memory
from bayestune.scoring import row_logits
from promises import LONG

WIDE = BLoB(prior_std=0.4, final_std=0.3, schedule="constant")


def test_the_temperature_minimises_the_averaged_nll():
    torch.manual_seed(0)
    truth = torch.randn(400, 4)
    labels = torch.distributions.Categorical(logits=truth).sample()
    assert 2.3 < best_temperature(3 * truth[None], labels) < 3.9  # a third of these logits is true
    draws = torch.stack([3 * truth, 3 * truth + torch.randn(400, 4)])
    draws[:, :50, 3] = -torch.inf
    labels[:50] = labels[:50] % 3
    found = best_temperature(draws, labels)
    losses = [predictive_nll(draws.double() / (found * by), labels) for by in (0.95, 1, 1.05)]
    assert losses[1] == min(losses)


def test_temperature_is_stored_and_applied(case, tmp_path):
    posterior = case.fit(Temperature())
    plain = case.fit(MLE()).logits(case.batch, Draws(1))
    torch.testing.assert_close(
        posterior.logits(case.batch, Draws(1)), plain / posterior.temperature
    )
    assert posterior.report.extra == {"temperature": posterior.temperature}
    loaded = load_posterior(case.make(), save_posterior(posterior, tmp_path), case.scorer)
    assert loaded.temperature == posterior.temperature


@pytest.mark.parametrize("factors", [(0.0, 0.5, 1.0, 4.0), (0.25,)])
def test_the_scale_of_least_held_out_nll_is_kept(case, factors):
    posterior = case.fit(PosteriorScale(base=WIDE, factors=factors), **LONG)
    losses, scale = (posterior.report.extra[name] for name in ("nll_by_scale", "scale"))
    assert losses[scale] == min(losses.values())
    plain = case.fit(WIDE, **LONG).layers()
    for name, layer in posterior.layers().items():
        torch.testing.assert_close(layer.std, scale * plain[name].std)


def test_the_scale_is_searched_under_the_prefix_it_is_meant_for(case):
    method = PosteriorScale(base=WIDE, factors=(4.0,), draws=4, shared_prefix=1)
    posterior = case.fit(method, **LONG)
    rows = case.scorer.encode(case.task.held_out)
    labels = torch.tensor([row.answer for row in case.task.held_out])

    def loss(prefix):
        logits = row_logits(posterior, case.scorer, rows, Draws(4, shared_prefix=prefix))
        return predictive_nll(logits.double(), labels).item()

    found = posterior.report.extra["nll_by_scale"][posterior.report.extra["scale"]]
    assert found == pytest.approx(loss(1), rel=1e-6)
    assert found != pytest.approx(loss(None), rel=1e-4)


def test_a_base_that_is_not_gaussian_has_no_scale(case):
    message = "PosteriorScale scales a Gaussian: got a Point from its base"
    with pytest.raises(ValueError, match=message):
        case.fit(PosteriorScale(base=MLE()))


@pytest.mark.parametrize("method", [Temperature(), PosteriorScale(factors=(1.0,))])
def test_the_report_covers_the_work_after_the_base(case, monkeypatch, method):
    keep_freed_memory(False)
    base = case.fit(method.base).report.peak_memory_mb
    collate = type(case.scorer).collate

    def hungry(self, rows):
        if len(rows) == len(case.task.held_out):
            torch.ones(2**27)  # 512 MiB
        return collate(self, rows)

    monkeypatch.setattr(type(case.scorer), "collate", hungry)
    assert case.fit(method, batch_size=3).report.peak_memory_mb > base + 256
