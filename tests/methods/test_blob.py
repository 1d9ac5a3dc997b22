"""BLoB on the output head alone, where all is known in closed form; its authors' form."""

import pytest
import torch

from bayestune.adapters import SIDES, GaussianLinear, drawn, evaluating
from bayestune.forward import Draws
from bayestune.forward.verdicts import without_comparison
from bayestune.methods import (
    BBB,
    METHODS,
    TFB,
    AuthorsBLoB,
    BLoB,
    Ensemble,
    PosteriorScale,
    Temperature,
)
from bayestune.posteriors import Gaussian, TokenNoise, predict
from promises import LONG, Case

LAST = BLoB(prior_std=0.4, final_std=0.3, schedule="constant", layers="last")


def test_which_slots_are_gaussian(case):
    assert list(case.fit(LAST).draw(0)) == ["lm_head.lora_A"]
    both = case.fit(BBB())
    assert set(both.draw(0)) == set(both.slots.names(SIDES))
    authors = case.fit(AuthorsBLoB())
    assert isinstance(authors, TokenNoise)
    assert {layer.noise for layer in authors.slots.of_kind(GaussianLinear).values()} == {"token"}


@pytest.mark.parametrize("scoring", ["letter", "text"])
def test_draws_of_the_head_alone_cost_one_pass_and_equal_the_plain_ones(scoring):
    case = Case(scoring)
    posterior = case.fit(LAST, **LONG)
    widths = []
    first = posterior.model.get_base_model().model.layers[0]
    hook = first.register_forward_pre_hook(lambda _, args: widths.append(len(args[0])))
    with without_comparison():
        logits = posterior.logits(case.batch, Draws(5))
    hook.remove()
    assert widths == [len(case.batch["input_ids"])]
    for index in range(5):
        weights = {name: weight[None] for name, weight in posterior.draw(index).items()}
        with evaluating(posterior.model), drawn(posterior.model, weights):
            plain = case.scorer(posterior.model, case.batch)
        torch.testing.assert_close(plain, logits[index], atol=1e-5, rtol=1e-5)


def test_class_logits_of_the_head_alone_are_gaussian_with_the_closed_form_moments(case):
    posterior = case.fit(LAST, **LONG)
    hidden = []
    layer = posterior.model.get_base_model().lm_head
    hook = layer.register_forward_pre_hook(lambda _, args: hidden.append(args[0][:, -1].double()))
    mean = posterior.logits(case.batch, Draws(0))[0]
    hook.remove()
    count = 3000
    logits = posterior.logits(case.batch, Draws(count))
    b = (
        layer.lora_B["default"]
        .weight.detach()
        .double()[case.scorer.tokens[: case.batch["option_mask"].shape[1]]]
    )
    std = layer.lora_A["default"].std.detach().double()
    variance = layer.scaling["default"] ** 2 * (hidden[0].square() @ std.T.square()) @ b.T.square()
    present = case.batch["option_mask"]
    error = ((logits.mean(0) - mean).double() / (variance / count).sqrt())[present]
    assert error.abs().max() < 4.5
    spread = (logits.double().var(0) / variance - 1)[present] / (2 / count) ** 0.5
    assert spread.abs().max() < 4.5


def test_post_hoc_methods_compose(case):
    ensemble = Ensemble(base=Temperature(), size=2)
    for method in (Temperature(base=BLoB()), ensemble, PosteriorScale(base=TFB(evaluations=1))):
        posterior = case.fit(method, steps=4)
        assert predict(posterior, case.batch, 2).probabilities.isfinite().all()
    assert isinstance(case.fit(METHODS["posterior_scale"]()), Gaussian)
