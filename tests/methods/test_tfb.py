import pytest
import torch

from bayestune.forward import Draws
from bayestune.methods import MLE, TFB, BLoB, Ensemble
from bayestune.methods.tfb import rotate_, set_isotropic_
from bayestune.posteriors import Point
from promises import LONG


def b_of(name):
    return name.removesuffix("A") + "B"


def test_the_rotation_leaves_the_product_alone_and_makes_b_orthogonal(case):
    point = case.fit(MLE(), **LONG)
    before = {name: weight.clone() for name, weight in point.slots.weights().items()}
    logits = point.logits(case.batch, Draws(0))
    values = rotate_(point.slots)
    after = point.slots.weights()
    for name, d in values.items():
        b = after[b_of(name)]
        product = before[b_of(name)] @ before[name]
        torch.testing.assert_close(b @ after[name], product, atol=1e-5, rtol=1e-4)
        gram = b.double().T @ b.double()
        torch.testing.assert_close(gram, d.square().diag(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(point.logits(case.batch, Draws(0)), logits, atol=1e-4, rtol=1e-4)


def test_the_noise_on_the_weight_is_isotropic_on_the_columns_of_b(case):
    posterior = case.fit(TFB(anchors=6, draws=2, evaluations=1), **LONG)
    weights = posterior.slots.weights()
    layers = posterior.layers()
    values = {name: weights[b_of(name)].double().norm(dim=0) for name in layers}
    set_isotropic_(posterior, values, 0.3)
    for name, layer in layers.items():
        b = weights[b_of(name)].double()
        covariance = b @ layer.std.detach().double()[:, 0].square().diag() @ b.T  # a column's
        projector = b @ torch.linalg.pinv(b)
        torch.testing.assert_close(covariance, 0.3**2 * projector, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("metric", "tolerance"), [("nll", 0.02), ("accuracy", 0.1)])
def test_the_largest_feasible_scale_that_was_tried_is_kept(case, metric, tolerance):
    method = TFB(metric=metric, tolerance=tolerance, anchors=12, draws=4, evaluations=10)
    extra = case.fit(method, **LONG).report.extra
    (_, reference), *tried = extra["search"]
    bound = tolerance * reference if metric == "nll" else tolerance
    sign = 1 if metric == "nll" else -1
    feasible = [std for std, loss in tried if sign * (loss - reference) <= bound]
    infeasible = [std for std, loss in tried if sign * (loss - reference) > bound]
    assert extra["too_much_found"]
    assert extra["isotropic_std"] == max(feasible)
    assert min(infeasible) / max(feasible) < 2.01  # and it cannot be much larger


def test_a_noise_that_improves_the_nll_is_feasible():
    best, tried = TFB(start=0.1, evaluations=4)._search(lambda std: 1 - min(std, 0.5))
    assert (best, len(tried)) == (0.8, 5)
    worse = TFB(metric="accuracy", evaluations=3)._search(lambda std: 0.5 - 20 * std)
    assert worse[0] < 0.001


def test_it_says_so_when_no_noise_was_too_much(case, caplog):
    found = case.fit(TFB(tolerance=100.0, anchors=6, draws=2, evaluations=3), **LONG).report.extra
    assert found["isotropic_std"] == 0.004
    assert not found["too_much_found"]
    (said,) = [one.getMessage() for one in caplog.records if one.name.endswith("tfb")]
    assert "none of 3 standard deviations was too much" in said
    assert "0.004, the largest tried" in said


def test_tfb_starts_from_the_mean_of_a_gaussian(case):
    blob = BLoB(final_std=0.1, schedule="constant")
    mean = case.fit(blob).logits(case.batch, Draws(0))
    posterior = case.fit(TFB(base=blob, anchors=6, draws=2, evaluations=2))
    torch.testing.assert_close(posterior.logits(case.batch, Draws(0)), mean, atol=1e-4, rtol=1e-4)


def test_the_report_covers_the_base_and_the_search(case, monkeypatch):
    peaks = iter([30.0, 50.0])
    monkeypatch.setattr("bayestune.training.meter.peak_memory_mb", lambda: next(peaks))
    report = case.fit(TFB(anchors=6, draws=2, evaluations=2)).report
    assert report.peak_memory_mb == 50.0
    assert report.seconds > report.extra["base_seconds"] > 0


def test_what_tfb_cannot_start_from_is_refused(case):
    with pytest.raises(
        ValueError, match="TFB starts from one adapter: got a Mixture without a mean"
    ):
        case.fit(TFB(base=Ensemble(size=2)))
    with pytest.raises(
        ValueError, match="unknown metric: got 'loss', expected 'nll' or 'accuracy'"
    ):
        TFB(metric="loss")
    point = case.fit(MLE())
    with pytest.raises(ValueError, match="TFB needs anchor rows with answers: got 0 rows"):
        TFB().bayesianise(Point(point.model, case.scorer), case.scorer, ())
