import math
from dataclasses import replace

import pytest

from bayestune.adapters import SIDES, Lora
from bayestune.curvature import Diagonal
from bayestune.forward import Draws
from bayestune.methods import MLE, BLoB, Laplace
from bayestune.methods.laplace import GRID, last_slots
from bayestune.posteriors import Linearised, Sampled, predict
from promises import Case

LORA = {"lora": Lora(rank=2, targets=("q_proj", "v_proj"))}


@pytest.mark.parametrize("predictive", ["linearised", "sampled"])
@pytest.mark.parametrize("options", [{}, {"scoring": "text", "layout": "expanded"}])
def test_fit(predictive, options):
    case = Case(**options)
    posterior = case.fit(Laplace(predictive=predictive), **LORA)
    assert type(posterior) is (Sampled if predictive == "sampled" else Linearised)
    assert predict(posterior, case.batch, 10).mutual_information.max() > 1e-6
    assert set(posterior.blocks) == set(posterior.slots.names(SIDES))
    extra = posterior.report.extra
    assert 0 < extra["laplace_seconds"] < posterior.report.seconds
    assert extra["prior_precision"] == posterior.prior_precision
    assert math.isfinite(extra["log_evidence"])


def test_bf16_training(case):
    posterior = case.fit(Laplace(), bf16=True, **LORA)
    assert posterior.logits(case.batch, Draws(2))[..., :3].isfinite().all()


def test_settings_of_the_fit(case):
    method = Laplace(base=MLE(), structure="diagonal", prior_precision=2.5, batch_size=3)
    posterior = case.fit(method, **LORA)
    assert (posterior.prior_precision, posterior.max_rows) == (2.5, 3)
    assert all(isinstance(block, Diagonal) for block in posterior.blocks.values())


def test_the_last_layers_are_the_heads_or_the_last_blocks(case):
    last = case.fit(Laplace(layers="last"), **LORA)
    layer = "model.layers.1.self_attn"
    names = [f"{layer}.{part}.{side}" for part in ("q_proj", "v_proj") for side in SIDES]
    assert list(last.blocks) == names
    head = ["lm_head.lora_A", "lm_head.lora_B"]
    assert last_slots([*names, *head]) == head


def test_precision_chosen_on_held_out_rows(case):
    posterior = case.fit(Laplace(choose="held_out"), **LORA)
    batch, labels = case.collate(case.task.held_out)

    def loss(precision):
        chosen = replace(posterior, prior_precision=precision)
        probabilities = predict(chosen, batch, 1000).probabilities
        return -probabilities.gather(1, labels[:, None]).log().sum().item()

    losses = [loss(precision) for precision in GRID]
    assert posterior.prior_precision in GRID
    assert loss(posterior.prior_precision) == pytest.approx(min(losses), rel=1e-4)


def test_the_report_covers_the_base_and_the_curvature(case, monkeypatch):
    peaks = iter([30.0, 50.0, 60.0, 40.0])
    monkeypatch.setattr("bayestune.training.meter.peak_memory_mb", lambda: next(peaks))
    assert [case.fit(Laplace(), **LORA).report.peak_memory_mb for _ in range(2)] == [50.0, 60.0]


def test_a_base_that_is_not_a_point_is_refused(case):
    message = "Laplace builds on a point: got a Gaussian from its base, expected a Point"
    with pytest.raises(ValueError, match=message):
        case.fit(Laplace(base=BLoB()))


def test_a_precision_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="prior_precision must be positive: got 0"):
        Laplace(prior_precision=0)
