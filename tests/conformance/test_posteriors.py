"""One suite over all families of posteriors: what their draws promise, whichever they are."""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from bayestune.adapters import Slots, bayesify
from bayestune.curvature import Diagonal
from bayestune.forward import Batch, ClassLogits, Draws, without_common_prefix
from bayestune.posteriors import (
    KINDS,
    AdapterPosterior,
    Dropout,
    Gaussian,
    Linearised,
    LowRank,
    Mixture,
    Point,
    Posterior,
    Sampled,
    Scaled,
    Tempered,
    TokenNoise,
    export_draw,
    load_adapter,
    load_posterior,
    predict,
    save_posterior,
)
from tiny import CLOSE, adapted, passes, ragged_batches, tiny_llama, with_second

Make = Callable[[nn.Module, ClassLogits], Posterior]


def gaussian(model: nn.Module, scorer: ClassLogits) -> Gaussian:
    bayesify(model, init_root_std=0.5)
    return Gaussian(model, scorer)


def token_noise(model: nn.Module, scorer: ClassLogits) -> TokenNoise:
    bayesify(model, init_root_std=0.5)
    return TokenNoise(model, scorer)


def scaled(model: nn.Module, scorer: ClassLogits) -> Scaled:
    return Scaled(model, scorer, {name: torch.full((8, 1), 0.5) for name in Slots(model).names()})


def low_rank(model: nn.Module, scorer: ClassLogits) -> LowRank:
    shapes = Slots(model).shapes()
    torch.manual_seed(3)
    variances = {name: torch.full(shape, 0.02) for name, shape in shapes.items()}
    deviations = {name: 0.2 * torch.randn(3, *shape) for name, shape in shapes.items()}
    return LowRank(model, scorer, variances, deviations)


def blocks(model: nn.Module) -> dict[str, Diagonal]:
    shapes = Slots(model).shapes()
    return {name: Diagonal(torch.full(shape, 20.0)) for name, shape in shapes.items()}


def linearised(model: nn.Module, scorer: ClassLogits) -> Linearised:
    return Linearised(model, scorer, blocks(model), prior_precision=5.0, max_rows=2)


def sampled(model: nn.Module, scorer: ClassLogits) -> Sampled:
    return Sampled(model, scorer, blocks(model), prior_precision=5.0)


def mixture_of(make: Make, other: Callable[..., Posterior]) -> Make:
    """A family under the first adapter, another one under a second adapter of the same layers."""

    def mixture(model: nn.Module, scorer: ClassLogits) -> Mixture:
        with_second(model)
        return Mixture([make(model, scorer), other(model, scorer, adapter="b")])

    return mixture


FAMILIES: dict[str, Make] = {
    "point": Point,
    "gaussian": gaussian,
    "token_noise": token_noise,
    "scaled": scaled,
    "low_rank": low_rank,
    "dropout": Dropout,
    "linearised": linearised,
    "sampled": sampled,
    "tempered": lambda model, scorer: Tempered(gaussian(model, scorer), 2.0),
    "mixture": mixture_of(gaussian, Point),
}
CASES = FAMILIES | {
    "tempered dropout": lambda model, scorer: Tempered(Dropout(model, scorer), 2.0),
    "tempered mixture": lambda model, scorer: Tempered(FAMILIES["mixture"](model, scorer), 2.0),
    "mixture of passes": mixture_of(Dropout, Dropout),
    "mixture, member by member": mixture_of(linearised, Point),
}
# Draws that are noisy passes depend on the batch; masks of dropout on what shares their pass too
MASKS = {"dropout", "tempered dropout", "mixture of passes"}
NOISY = MASKS | {"token_noise"}
FUNCTIONS = sorted(CASES.keys() - NOISY)


@pytest.fixture
def batches(byte_level) -> tuple[ClassLogits, list[Batch]]:
    """A scorer, and batches of prompts that begin with the same example."""
    return ragged_batches(byte_level, "letter", [(0, 1, 2), (1, 3), (2, 0, 3)])


@pytest.fixture
def batch(batches) -> Batch:
    return batches[1][0]


@pytest.fixture(params=CASES)
def name(request) -> str:
    return request.param


@pytest.fixture
def posterior(name, batches) -> Posterior:
    return CASES[name](adapted(tiny_llama(), lora_dropout=0.3), batches[0])


def exports(posterior: Posterior) -> bool:
    members = posterior.members if isinstance(posterior, Mixture) else [posterior]
    return all(isinstance(member, AdapterPosterior) for member in members)


def spread(logits: torch.Tensor) -> float:
    return logits.nan_to_num(neginf=0).var(0).max().item()


def test_every_family_is_in_the_suite():
    ours = {kind for kind, made in KINDS.items() if made.__module__.startswith("bayestune.")}
    assert ours == set(FAMILIES)


def test_logits_are_of_draws_rows_and_classes_and_the_mean_is_one_draw(name, posterior, batch):
    assert posterior.kind == name or name not in FAMILIES
    logits = posterior.logits(batch, Draws(3))
    assert logits.shape == (3, 3, 4)
    assert torch.equal(logits.isfinite(), batch["option_mask"].expand(3, -1, -1))
    if posterior.has_mean:
        assert posterior.logits(batch, Draws(0)).shape == (1, 3, 4)
    else:
        with pytest.raises(ValueError, match="has no mean: got draws=0, expected 1 or more"):
            posterior.logits(batch, Draws(0))


def test_a_seed_gives_the_same_draws_and_another_one_others(posterior, batch):
    logits = posterior.logits(batch, Draws(3, seed=1))
    assert torch.equal(posterior.logits(batch, Draws(3, seed=1)), logits)
    if posterior.atoms in (None, 1000):
        assert spread(logits) > 0
        assert not torch.allclose(posterior.logits(batch, Draws(3, seed=2)), logits)
    else:
        assert (posterior.atoms, spread(logits)) == (1, 0)


def test_more_draws_begin_with_the_same_and_later_ones_go_on(name, posterior, batch):
    bounds = {"max_rows": 1} if name in MASKS else {}  # a pass for each draw
    whole = posterior.logits(batch, Draws(10, **bounds))
    assert_close(posterior.logits(batch, Draws(5, **bounds)), whole[:5], **CLOSE)
    assert_close(posterior.logits(batch, Draws(5, first=5, **bounds)), whole[5:], **CLOSE)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_draw_is_a_function_of_the_row(posterior, batch):
    whole = posterior.logits(batch, Draws(5))
    for bounds in ({"max_rows": 7}, {"max_tokens": 1}):
        assert_close(posterior.logits(batch, Draws(5, **bounds)), whole, **CLOSE)
    one = {name: value[1:2] for name, value in batch.items()}
    assert_close(posterior.logits(one, Draws(5)), whole[:, 1:2], **CLOSE)


@pytest.mark.parametrize("name", sorted(NOISY))
def test_a_draw_that_is_a_noisy_pass_is_a_function_of_the_batch(posterior, batch):
    one = {name: value[1:2] for name, value in batch.items()}
    whole = posterior.logits(batch, Draws(2))
    assert not torch.allclose(posterior.logits(one, Draws(2)), whole[:, 1:2], atol=1e-3)


def test_what_is_saved_and_loaded_gives_the_same_logits_bit_for_bit(posterior, batch, tmp_path):
    folder = save_posterior(posterior, tmp_path)
    loaded = load_posterior(tiny_llama(), folder, posterior.scorer)
    assert type(loaded) is type(posterior)
    for draws in [Draws(3, seed=1, first=1), *[Draws(0)] * posterior.has_mean]:
        assert torch.equal(loaded.logits(batch, draws), posterior.logits(batch, draws))
    assert not any(module.training for module in loaded.model.modules())


def test_another_scorer_asks_the_same_posterior(posterior, batch):
    def twice(model: nn.Module, batch: Batch) -> torch.Tensor:
        return 2 * scorer(model, batch)

    scorer = posterior.scorer
    logits = posterior.logits(batch, Draws(3))
    assert_close(posterior.on(twice).logits(batch, Draws(3)), 2 * logits, **CLOSE)
    assert type(posterior.on(twice)) is type(posterior)
    assert posterior.scorer is scorer
    assert torch.equal(posterior.logits(batch, Draws(3)), logits)


def test_a_draw_is_the_adapter_that_it_is_exported_as_or_refused(posterior, batch, tmp_path):
    if exports(posterior):
        logits = posterior.logits(batch, Draws(4, seed=1))
        for index in (0, 3):
            folder = export_draw(posterior, index, tmp_path / f"{index}", seed=1)
            plain = load_adapter(tiny_llama(), folder, posterior.scorer)
            assert_close(plain.logits(batch, Draws(0))[0], logits[index], **CLOSE)
    else:
        with pytest.raises(ValueError, match="draws are not adapters"):
            export_draw(posterior, 0, tmp_path)


def test_a_shared_prefix_is_served_or_refused_by_name(posterior, batch):
    inner = posterior.base if isinstance(posterior, Tempered) else posterior
    if isinstance(inner, AdapterPosterior):
        exact = posterior.logits(batch, Draws(3))
        assert_close(posterior.logits(batch, Draws(3, shared_prefix=1000)), exact, **CLOSE)
        mean = posterior.logits(batch, Draws(0, shared_prefix=2))
        assert torch.equal(mean, posterior.logits(batch, Draws(0)))
    else:
        with pytest.raises(ValueError, match=f"{type(inner).__name__}.*expected None|without a"):
            posterior.logits(batch, Draws(3, shared_prefix=2))


def test_the_beginning_that_rows_have_in_common_changes_nothing(posterior, batches):
    seen = passes(posterior.model)
    for batch in batches[1] * 3:
        seen.clear()
        found = posterior.logits(batch, Draws(12))
        shapes = list(seen)
        with without_common_prefix():
            assert_close(found, posterior.logits(batch, Draws(12)), **CLOSE)
    if exports(posterior):  # by then it is read
        assert max(shapes)[1] < batch["input_ids"].shape[1]


def test_precision_travels_with_the_draws(posterior, batch):
    for count in [2, *[0] * posterior.has_mean]:
        plain = posterior.logits(batch, Draws(count))
        narrow = posterior.logits(batch, Draws(count, bf16=True))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(posterior.logits(batch, Draws(count)), narrow)
        assert not torch.equal(narrow.float(), plain)
        assert_close(narrow.float(), plain, rtol=0.1, atol=0.1)


def state_of(model: nn.Module) -> Mapping[str, object]:
    """All that a prediction must leave as it is."""
    return {
        "modules": list(model.modules()),
        "modes": [module.training for module in model.modules()],
        "trainable": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [parameter.grad for parameter in model.parameters()],
        "weights": [value.sum().item() for value in model.state_dict().values()],
        "hooks": [len(module._forward_pre_hooks) for module in model.modules()],
        "adapters": model.active_adapters,
        "noise": torch.get_rng_state().tolist(),
        "autograd": torch.is_grad_enabled(),
    }


def test_predicting_leaves_the_model_and_the_generator_as_they_were(posterior, batch):
    model = posterior.model.train()
    model.get_base_model().model.layers[0].eval()
    before = state_of(model)
    predict(posterior, batch, 3)
    assert state_of(model) == before

    def fail(model: nn.Module, batch: Batch) -> torch.Tensor:
        raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        predict(posterior.on(fail), batch, 3)
    assert state_of(model) == before


def test_draws_follow_the_model_when_it_changes(posterior, batch):
    before = posterior.logits(batch, Draws(2))
    for slot in Slots(posterior.model, "default").modules().values():
        slot.weight.data.mul_(1.5)
    found = posterior.logits(batch, Draws(2))
    assert not torch.allclose(found[0], before[0], atol=1e-3)
    assert_close(found, posterior.on(posterior.scorer).logits(batch, Draws(2)), **CLOSE)
