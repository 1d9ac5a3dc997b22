"""Methods that build on others: what they leave alone, what they find, what they refuse."""

from dataclasses import replace

import pytest
import torch

from bayestune.adapters import Lora, adapter_weights, slots
from bayestune.forward import Draws
from bayestune.methods import (
    MAP,
    METHODS,
    MLE,
    TFB,
    BLoB,
    Ensemble,
    MCDropout,
    PosteriorScale,
    Temperature,
)
from bayestune.methods.held_out import predictive_nll
from bayestune.methods.temperature import best_temperature
from bayestune.methods.tfb import rotate_, set_isotropic_
from bayestune.posteriors import (
    Dropout,
    Gaussian,
    Mixture,
    Point,
    Scaled,
    Tempered,
    load_posterior,
    predict,
    save_posterior,
)
from bayestune.posteriors.posterior import Saved
from bayestune.scoring import make_scorer, row_logits
from bayestune.training import Training

TRAINING = Training(steps=40, learning_rate=3e-2, progress=False)


@pytest.fixture
def scorer(llama, byte_level, tiny_task):
    return make_scorer(llama(), byte_level, tiny_task, "letter")


@pytest.fixture
def batch(scorer, tiny_task):
    batch = scorer.collate(scorer.encode(tiny_task.evaluation))
    batch.pop("labels")
    return batch


# MAP


def test_map_shrinks_and_a_weak_prior_is_mle(llama, scorer):
    def norm(method):
        return sum(
            w.square().sum()
            for w in adapter_weights(method.fit(llama(), scorer, TRAINING).model).values()
        )

    mle = norm(MLE())
    assert norm(MAP(weight_decay=0.0)) == mle
    assert norm(MAP(weight_decay=1.0)) < 0.95 * mle
    assert norm(MAP(prior_std=0.02)) < 0.95 * mle
    torch.testing.assert_close(norm(MAP(prior_std=1e6)), mle)


def test_the_priors_gradient_is_theta_over_n_and_its_variance(llama, scorer):
    from bayestune.methods.map import GaussianPrior

    model = MLE().fit(llama(), scorer, TRAINING).model
    weights = [slot.get_parameter("weight") for slot in slots(model).values()]
    optimizer = torch.optim.SGD(weights, lr=0.0)
    prior = GaussianPrior(prior_std=0.5, num_rows=12)
    prior.on_train_begin(None, None, None, model=model, optimizer=optimizer)
    log_prior = sum(torch.distributions.Normal(0.0, 0.5).log_prob(w).sum() for w in weights)
    expected = torch.autograd.grad(-log_prior / 12, weights)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    for weight, value in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.grad, value)


def test_a_prior_without_a_scale_is_refused():
    with pytest.raises(
        ValueError, match="a prior has a positive scale: got weight_decay=1e-05, prior_std=0"
    ):
        MAP(prior_std=0)


# MC dropout


def test_token_masks_are_lora_dropout_and_the_mean_has_none(llama, scorer, batch):
    posterior = MCDropout(dropout=0.5).fit(llama(), scorer, TRAINING)
    assert isinstance(posterior, Dropout)
    state = torch.get_rng_state()
    first, second = posterior.logits(batch, Draws(4)), posterior.logits(batch, Draws(4))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(posterior.logits(batch, Draws(4, seed=1)), first)
    assert torch.equal(
        posterior.logits(batch, Draws(0)), Point(posterior.model, scorer).logits(batch, Draws(0))
    )


def test_held_masks_drop_columns_and_average_to_the_mean(llama, scorer):
    posterior = MCDropout(dropout=0.25, masks="held").fit(llama(), scorer, TRAINING)
    assert isinstance(posterior, Scaled)
    name, slot = next(iter(slots(posterior.model).items()))
    draws = torch.stack([posterior.draw(index)[name] for index in range(4000)])
    ratio = draws / slot.weight.detach()
    assert torch.equal(ratio.amin(1), ratio.amax(1)) or torch.allclose(
        ratio.amin(1), ratio.amax(1)
    )  # whole columns
    kept = (ratio[:, 0] > 0).double()
    assert torch.allclose(ratio[:, 0].double(), kept / 0.75, atol=1e-5)
    assert ((kept.mean(0) - 0.75) / (0.75 * 0.25 / 4000) ** 0.5).abs().max() < 4.5


def test_mc_dropout_refuses_what_it_cannot_do(llama, scorer):
    with pytest.raises(ValueError, match=r"dropout must lie in \(0, 1\): got 0"):
        MCDropout(dropout=0)
    with pytest.raises(
        ValueError,
        match="MCDropout builds on a point: got a Gaussian from its base, expected a Point",
    ):
        MCDropout(base=BLoB()).fit(llama(), scorer, TRAINING)
    plain = MLE().fit(llama(), scorer, TRAINING)
    with pytest.raises(ValueError, match="the adapter has no dropout: got lora_dropout=0"):
        Dropout(plain.model, scorer)


# Ensembles


@pytest.mark.parametrize("base", [MLE(), BLoB()])
def test_an_ensemble_of_one_is_its_base(llama, scorer, batch, base):
    single = base.fit(llama(), scorer, TRAINING).logits(batch, Draws(3))
    assert torch.equal(
        Ensemble(base, size=1).fit(llama(), scorer, TRAINING).logits(batch, Draws(3)), single
    )


def test_an_ensembles_members_are_the_fits_of_its_seeds_in_one_pass(llama, scorer, batch):
    mixture = Ensemble(MLE(), size=3, seed_step=7).fit(llama(), scorer, TRAINING)
    alone = [
        MLE().fit(llama(), scorer, replace(TRAINING, seed=1 + 7 * k)).logits(batch, Draws(1))[0]
        for k in range(3)
    ]
    passes = []
    hook = mixture.model.register_forward_pre_hook(lambda *_: passes.append(1))
    logits = mixture.logits(batch, Draws(3))
    hook.remove()
    assert len(passes) == 1
    torch.testing.assert_close(logits, torch.stack(alone), atol=1e-5, rtol=1e-5)
    averaged = torch.stack(alone).double().softmax(-1).mean(0)
    torch.testing.assert_close(
        predict(mixture, batch, draws=10).probabilities, averaged, atol=1e-6, rtol=1e-5
    )
    with pytest.raises(ValueError, match="draws=0 means the mean, but Mixture has none"):
        predict(mixture, batch, draws=0)


def test_an_ensemble_of_gaussians_takes_draws_of_each_member_in_turn(llama, scorer, batch):
    base = BLoB(prior_std=0.4, final_std=0.3, schedule="constant")
    mixture = Ensemble(base, size=2).fit(llama(), scorer, TRAINING)
    alone = [
        base.fit(llama(), scorer, replace(TRAINING, seed=s)).logits(batch, Draws(2))
        for s in (1, 1001)
    ]
    expected = torch.stack([alone[0][0], alone[1][0], alone[0][1], alone[1][1]])
    torch.testing.assert_close(mixture.logits(batch, Draws(4)), expected, atol=1e-5, rtol=1e-5)
    assert mixture.atoms is None


def test_finished_members_are_kept_when_a_fit_goes_on(llama, scorer, batch, tmp_path, monkeypatch):
    training = replace(TRAINING, output=tmp_path)
    first = Ensemble(size=2).fit(llama(), scorer, training)
    fits = []
    plain = MLE.fit
    monkeypatch.setattr(MLE, "fit", lambda self, *given: fits.append(1) or plain(self, *given))
    (tmp_path / "member-1" / "posterior.json").unlink()
    again = Ensemble(size=2).fit(llama(), scorer, replace(training, resume=True))
    assert len(fits) == 1
    assert torch.equal(again.logits(batch, Draws(2)), first.logits(batch, Draws(2)))
    assert again.fitted["steps"] == 2 * TRAINING.steps


def test_members_with_heads_of_their_own_run_one_by_one(bert, byte_level, labelled_task):
    scorer = make_scorer(bert(), byte_level, labelled_task, "head")
    batch = scorer.collate(scorer.encode(labelled_task.evaluation))
    batch.pop("labels")
    mixture = Ensemble(MLE(), size=2).fit(bert(), scorer, TRAINING)
    alone = [
        MLE().fit(bert(), scorer, replace(TRAINING, seed=s)).logits(batch, Draws(1))[0]
        for s in (1, 1001)
    ]
    trainable = [name for name, p in mixture.model.named_parameters() if p.requires_grad]
    torch.testing.assert_close(
        mixture.logits(batch, Draws(2)), torch.stack(alone), atol=1e-6, rtol=1e-5
    )
    assert mixture.model.active_adapter == "default"
    assert [name for name, p in mixture.model.named_parameters() if p.requires_grad] == trainable


def test_mixtures_that_make_no_sense_are_refused(llama, scorer):
    point = MLE().fit(llama(), scorer, TRAINING)
    with pytest.raises(
        ValueError,
        match=r"each with its own adapter: got the adapters \['default', 'default'\] on 1",
    ):
        Mixture([point, point])
    with pytest.raises(ValueError, match="an ensemble needs members: got size=0"):
        Ensemble(size=0)
    with pytest.raises(NotImplementedError, match="loaded member by member"):
        Mixture.restore(Saved(point.model, scorer, {}))
    tempered = Mixture([Tempered(point, 2.0)])
    with pytest.raises(ValueError, match="draws of Tempered are no adapters"):
        tempered.draw(0)


# TFB


def test_the_rotation_leaves_the_product_alone_and_makes_b_orthogonal(llama, scorer, batch):
    point = MLE().fit(llama(), scorer, TRAINING)
    before, logits = adapter_weights(point.model), point.logits(batch, Draws(0))
    before = {name: weight.clone() for name, weight in before.items()}
    values = rotate_(point.model)
    after = adapter_weights(point.model)
    for name, d in values.items():
        other = name.removesuffix("A") + "B"
        torch.testing.assert_close(
            after[other] @ after[name], before[other] @ before[name], atol=1e-5, rtol=1e-4
        )
        gram = after[other].double().T @ after[other].double()
        torch.testing.assert_close(gram, d.square().diag(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(point.logits(batch, Draws(0)), logits, atol=1e-4, rtol=1e-4)


def test_the_noise_on_the_weight_is_isotropic_on_the_columns_of_b(llama, scorer):
    posterior = TFB(anchors=6, draws=2, evaluations=1).fit(llama(), scorer, TRAINING)
    weights = adapter_weights(posterior.model)
    values = {
        n[:-1] + "A": torch.linalg.vector_norm(w.double(), dim=0)
        for n, w in weights.items()
        if n[-1] == "B"
    }
    set_isotropic_(posterior, values, 0.3)
    name = next(iter(values))
    b = weights[name.removesuffix("A") + "B"].double()
    std = slots(posterior.model)[name].std.detach().double()
    covariance = b @ std[:, 0].square().diag() @ b.T  # of one column of B·A
    projector = b @ torch.linalg.pinv(b)
    torch.testing.assert_close(covariance, 0.3**2 * projector, atol=1e-5, rtol=1e-4)


def test_the_largest_feasible_scale_that_was_tried_is_kept(llama, scorer):
    for metric, tolerance in (("nll", 0.02), ("accuracy", 0.1)):
        method = TFB(metric=metric, tolerance=tolerance, anchors=12, draws=4, evaluations=10)
        posterior = method.fit(llama(), scorer, TRAINING)
        (_, reference), *tried = posterior.fitted["search"]
        bound = tolerance * reference if metric == "nll" else tolerance
        feasible = [std for std, loss in tried if abs(loss - reference) <= bound]
        assert posterior.fitted["isotropic_std"] == max(feasible)
        assert any(
            abs(loss - reference) > bound for _, loss in tried
        )  # and it cannot be much larger
        infeasible = min(std for std, loss in tried if abs(loss - reference) > bound)
        assert infeasible / max(feasible) < 2.01


def test_tfb_starts_from_the_mean_of_a_gaussian(llama, scorer, batch):
    blob = BLoB(final_std=0.1, schedule="constant")
    mean = blob.fit(llama(), scorer, TRAINING).logits(batch, Draws(0))
    posterior = TFB(base=blob, anchors=6, draws=2, evaluations=2).fit(llama(), scorer, TRAINING)
    torch.testing.assert_close(posterior.logits(batch, Draws(0)), mean, atol=1e-4, rtol=1e-4)
    with pytest.raises(
        ValueError, match="TFB starts from one adapter: got a Mixture without a mean"
    ):
        TFB(base=Ensemble(size=2)).fit(llama(), scorer, TRAINING)
    with pytest.raises(
        ValueError, match="unknown metric: got 'loss', expected 'nll' or 'accuracy'"
    ):
        TFB(metric="loss")
    point = MLE().fit(llama(), scorer, TRAINING)
    with pytest.raises(ValueError, match="TFB needs anchor rows with answers: got 0 rows"):
        TFB().bayesianise(point, scorer, ())


# One scalar on held-out rows


def test_the_temperature_minimises_the_averaged_nll():
    torch.manual_seed(0)
    truth = torch.randn(400, 4)
    labels = torch.distributions.Categorical(logits=truth).sample()
    found = best_temperature(3 * truth[None], labels)
    assert 2.3 < found < 3.9  # the labels come from a third of these logits
    draws = torch.stack([3 * truth, 3 * truth + torch.randn(400, 4)]).masked_fill(
        torch.arange(4) == 4, 0
    )
    draws[:, :50, 3] = -torch.inf
    labels[:50] = labels[:50] % 3
    found = best_temperature(draws, labels)
    losses = [
        predictive_nll(draws.double() / (found * factor), labels) for factor in (0.95, 1, 1.05)
    ]
    assert losses[1] == min(losses)


def test_temperature_is_stored_and_applied(llama, scorer, batch, tmp_path):
    posterior = Temperature().fit(llama(), scorer, TRAINING)
    plain = MLE().fit(llama(), scorer, TRAINING)
    expected = plain.logits(batch, Draws(1)) / posterior.temperature
    torch.testing.assert_close(posterior.logits(batch, Draws(1)), expected)
    loaded = load_posterior(llama(), save_posterior(posterior, tmp_path), scorer)
    assert loaded.temperature == posterior.temperature
    with pytest.raises(ValueError, match="the temperature must be positive: got 0"):
        Tempered(plain, 0.0)


def test_the_scale_of_least_held_out_nll_is_kept(llama, scorer):
    blob = BLoB(prior_std=0.4, final_std=0.3, schedule="constant")
    posterior = PosteriorScale(base=blob, factors=(0.0, 0.5, 1.0, 4.0)).fit(
        llama(), scorer, TRAINING
    )
    losses, scale = posterior.fitted["nll_by_scale"], posterior.fitted["scale"]
    assert losses[scale] == min(losses.values())
    plain = blob.fit(llama(), scorer, TRAINING)
    for name, slot in slots(posterior.model).items():
        if name.endswith("A"):
            torch.testing.assert_close(slot.std, scale * slots(plain.model)[name].std)
    with pytest.raises(
        ValueError, match="PosteriorScale scales a Gaussian: got a Point from its base"
    ):
        PosteriorScale(base=MLE()).fit(llama(), scorer, TRAINING)


def test_the_scale_is_searched_under_the_prefix_it_is_meant_for(llama, scorer):
    blob = BLoB(prior_std=0.4, final_std=0.3, schedule="constant")
    posterior = PosteriorScale(base=blob, factors=(0.5, 4.0), draws=4, shared_prefix=1).fit(
        llama(), scorer, TRAINING
    )
    rows = scorer.task.held_out
    labels = torch.tensor([row.answer for row in rows])
    losses = []
    for prefix in (1, None):
        logits = row_logits(posterior, scorer, scorer.encode(rows), Draws(4, shared_prefix=prefix))
        losses.append(
            torch.nn.functional.nll_loss(logits.double().softmax(-1).mean(0).log(), labels).item()
        )
    shared, exact = losses
    found = posterior.fitted["nll_by_scale"][posterior.fitted["scale"]]
    assert found == pytest.approx(shared, rel=1e-6)
    assert found != pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("method", [Temperature(), PosteriorScale()])
def test_rows_seen_in_training_are_refused(llama, byte_level, tiny_task, method):
    name = type(method).__name__

    def refuse(held_out, words):
        scorer = make_scorer(llama(), byte_level, replace(tiny_task, held_out=held_out), "letter")
        with pytest.raises(ValueError, match=words):
            method.fit(llama(), scorer, TRAINING)

    refuse((), f"{name} chooses on held-out rows: got none, expected some")
    refuse(
        tiny_task.train[:2],
        f"{name} must not choose on rows seen in training: got 2 of 2, such as q0",
    )
    renamed = replace(tiny_task.train[3], id="another")
    refuse((tiny_task.held_out[0], renamed), "got 1 of 2, such as another")
    refuse((replace(tiny_task.held_out[0], answer=None),), "got a row without one")


# The output head alone


def headed(llama, byte_level, tiny_task, scoring="letter"):
    scorer = make_scorer(llama(), byte_level, tiny_task, scoring)
    batch = scorer.collate(scorer.encode(tiny_task.evaluation))
    batch.pop("labels")
    return scorer, batch


@pytest.mark.parametrize("scoring", ["letter", "text"])
def test_draws_of_the_head_alone_cost_one_pass_and_equal_the_plain_ones(
    llama, byte_level, tiny_task, scoring
):
    scorer, batch = headed(llama, byte_level, tiny_task, scoring)
    posterior = BLoB(prior_std=0.4, final_std=0.3, schedule="constant", layers="last").fit(
        llama(), scorer, TRAINING
    )
    assert list(posterior.draw(0)) == ["lm_head.lora_A"]
    widths = []
    hook = (
        posterior.model.get_base_model()
        .model.layers[0]
        .register_forward_pre_hook(lambda _, args: widths.append(len(args[0])))
    )
    logits = posterior.logits(batch, Draws(5))
    hook.remove()
    assert widths == [len(batch["input_ids"])]
    from bayestune.adapters import drawn, evaluating

    for index in range(5):
        weights = {name: weight[None] for name, weight in posterior.draw(index).items()}
        with evaluating(posterior.model), drawn(posterior.model, weights):
            torch.testing.assert_close(
                scorer(posterior.model, batch), logits[index], atol=1e-5, rtol=1e-5
            )


def test_class_logits_of_the_head_alone_are_gaussian_with_the_closed_form_moments(
    llama, byte_level, tiny_task
):
    scorer, batch = headed(llama, byte_level, tiny_task)
    posterior = BLoB(prior_std=0.4, final_std=0.3, schedule="constant", layers="last").fit(
        llama(), scorer, TRAINING
    )
    hidden = []
    layer = posterior.model.get_base_model().lm_head
    hook = layer.register_forward_pre_hook(lambda _, args: hidden.append(args[0][:, -1].double()))
    mean = posterior.logits(batch, Draws(0))[0]
    hook.remove()
    count = 3000
    logits = posterior.logits(batch, Draws(count))
    tokens = scorer.tokens[: batch["option_mask"].shape[1]]
    b = layer.lora_B["default"].weight.detach().double()[tokens]
    std = layer.lora_A["default"].std.detach().double()
    variance = layer.scaling["default"] ** 2 * (hidden[0].square() @ std.T.square()) @ b.T.square()
    present = batch["option_mask"]
    error = ((logits.mean(0) - mean).double() / (variance / count).sqrt())[present]
    assert error.abs().max() < 4.5
    spread = (logits.double().var(0) / variance - 1)[present] / (2 / count) ** 0.5
    assert spread.abs().max() < 4.5


def test_a_head_without_an_adapter_is_refused(llama, scorer):
    training = replace(TRAINING, lora=Lora(targets=("q_proj",)))
    for method in (BLoB(layers="last"), TFB(layers="last", anchors=4)):
        with pytest.raises(ValueError, match="got a model whose head has none, expected one"):
            method.fit(llama(), scorer, training)


def test_every_composition_of_the_table_fits(llama, scorer, batch):
    for method in (
        Temperature(base=BLoB()),
        Ensemble(base=Temperature(), size=2),
        PosteriorScale(base=TFB(evaluations=1)),
    ):
        posterior = method.fit(llama(), scorer, replace(TRAINING, steps=4))
        assert predict(posterior, batch, 2).probabilities.isfinite().all()
    assert isinstance(METHODS["posterior_scale"]().fit(llama(), scorer, TRAINING), Gaussian)
