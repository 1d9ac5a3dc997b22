"""Gauss-Newton blocks and the evidence against dense algebra."""

import math

import pytest
import torch

from bayestune.adapters import Slots
from bayestune.curvature import (
    Curvature,
    Diagonal,
    best_precision,
    factors,
    gauss_newton,
    log_evidence,
)
from bayestune.curvature.ggn import softmax_root
from dense import adapted, adapted_linear, close, dense, ggn, hessian, jacobians, score
from promises import Case
from tiny import tiny_llama

STRUCTURES = ["kfac", "diagonal"]


@pytest.fixture(scope="module")
def letters():
    return Case("letter")


@pytest.fixture(scope="module", params=["letter", "packed", "expanded"])
def case(request, letters):
    if request.param == "letter":
        return letters
    return Case("text", layout=request.param)


@pytest.fixture
def model():
    return adapted(tiny_llama(), ["q_proj", "v_proj", "down_proj"])


@pytest.fixture
def linear():
    return adapted_linear()


def blocks_of(model, scorer, batches, **settings):
    return gauss_newton(Slots(model), scorer, batches, **settings).blocks


def test_the_softmax_hessians_root_is_its_cholesky_factor():
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[1, 3] = logits[2, 1] = -torch.inf
    root = softmax_root(logits)
    torch.testing.assert_close(root @ root.mT, hessian(logits))
    assert (root.triu(1) == 0).all()
    assert (root[1, 3] == 0).all()


def test_the_root_of_a_row_that_the_model_is_sure_of_is_finite():
    sure = [[500.0, 0.0, -500.0], [-500.0, 0.0, 500.0], [0.0, -torch.inf, -torch.inf]]
    root = softmax_root(torch.tensor(sure))
    assert root.isfinite().all()
    assert root[2].abs().max() == 0


# Blocks


@pytest.mark.parametrize("structure", STRUCTURES)
def test_one_row_of_one_token_is_exact(linear, structure):
    batch = {"x": torch.randn(1, 6, dtype=torch.float64)}
    blocks = blocks_of(linear, score, [batch], structure=structure)
    logits, jacobian = jacobians(linear, score, batch)
    assert set(blocks) == {"head.lora_A", "head.lora_B"}
    for name, block in blocks.items():
        expected = ggn(logits, jacobian[name])
        exact = expected if structure == "kfac" else torch.diag(expected.diag())
        close(dense(block), exact, 1e-10)


def test_kfac_is_exact_where_all_rows_have_the_same_input(linear):
    x = torch.randn(1, 6, dtype=torch.float64).repeat(5, 1)
    blocks = blocks_of(linear, score, [{"x": x[:2]}, {"x": x[2:]}])
    logits, jacobian = jacobians(linear, score, {"x": x})
    for name, block in blocks.items():
        close(dense(block), ggn(logits, jacobian[name]), 1e-10)


def test_kfac_of_different_rows_is_the_product_of_the_mean_factors(linear):
    x = torch.randn(5, 6, dtype=torch.float64)
    block = blocks_of(linear, score, [{"x": x}])["head.lora_A"]
    b = 2.0 * Slots(linear).weights()["head.lora_B"]  # alpha/r = 2: ∂logit c/∂(A's output) is row c
    outer = torch.einsum("cr,ncd,ds->rs", b, hessian(linear(x).detach()), b)
    close(dense(block), torch.kron(outer, x.mT @ x) / 5, 1e-10)


def test_kfac_expand_by_its_definition(model, letters):
    batch = letters.collate(letters.task.evaluation[:4])[0]
    names = ["model.layers.0.self_attn.q_proj.lora_A", "model.layers.1.self_attn.q_proj.lora_B"]
    blocks = blocks_of(model, letters.scorer, [batch], names=names)
    slots, seen = Slots(model).modules(), {}
    for name in names:
        slots[name].register_forward_hook(
            lambda _, inputs, output, name=name: seen.update({name: (inputs[0], output)})
        )
    logits = letters.scorer(model, batch)
    last_only = 4  # the last layer's logits depend on the last position of each row
    for name, tokens in zip(names, (batch["attention_mask"].sum(), last_only), strict=True):
        inputs, output = seen[name]
        gradients = []
        for c in range(4):
            one = torch.eye(4)[c] * batch["option_mask"]
            gradients += torch.autograd.grad(logits, output, one, retain_graph=True)
        g = torch.stack(gradients, 1).double()
        token = (g != 0).any(-1).any(1)
        assert token.sum() == tokens
        outer = torch.einsum("nctr,ncd,ndts->rs", g, hessian(logits.detach()), g)
        a = inputs.detach()[token].double()
        close(dense(blocks[name]), torch.kron(outer, a.mT @ a) / tokens)


def test_the_diagonal_is_exact_for_sequences(model, case):
    blocks = blocks_of(model, case.scorer, [case.batch], structure="diagonal")
    logits, jacobian = jacobians(model, case.scorer, case.batch)
    assert len(blocks) == 12
    for name, block in blocks.items():
        close(dense(block).diag(), ggn(logits, jacobian[name]).diag())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_padding_and_batches_change_nothing_and_labels_are_scored(model, case, structure):
    rows = case.scorer.encode(case.task.train)
    assert len({row["length"] for row in rows}) > 1
    together = case.scorer.collate(rows)
    apart = [case.scorer.collate([row]) for row in rows]
    whole = gauss_newton(Slots(model), case.scorer, [together], structure=structure)
    alone = gauss_newton(Slots(model), case.scorer, apart, structure=structure)
    for name, block in whole.blocks.items():
        close(dense(block), dense(alone.blocks[name]))
    with torch.no_grad():
        logits = case.scorer(model, together)
    loss = torch.nn.functional.cross_entropy(logits, together["labels"], reduction="sum").item()
    assert whole.log_likelihood == pytest.approx(-loss, rel=1e-5)
    assert alone.log_likelihood == pytest.approx(-loss, rel=1e-5)


def test_low_rank_blocks_of_a_model_are_near_the_full_ones(model, letters, monkeypatch):
    rows = [letters.collate([row])[0] for row in letters.task.train]
    full = blocks_of(model, letters.scorer, rows)
    monkeypatch.setattr(factors, "FULL_UP_TO", 20)
    low = blocks_of(model, letters.scorer, rows, rank=20)
    assert low["model.layers.0.mlp.down_proj.lora_A"].in_vectors.shape == (64, 20)
    for name, block in full.items():
        error = (dense(low[name]) - dense(block)).norm()
        assert error < 0.05 * dense(block).norm()


def test_bfloat16_weights_and_autocast_give_float32_blocks(letters):
    rows = [letters.batch]
    plain = adapted(tiny_llama(), ["q_proj", "v_proj"])
    half = adapted(tiny_llama().bfloat16(), ["q_proj", "v_proj"])
    lora = {name: value for name, value in plain.state_dict().items() if "lora" in name}
    half.load_state_dict(lora, strict=False)
    exact = blocks_of(plain, letters.scorer, rows)
    rough = blocks_of(half, letters.scorer, rows)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = blocks_of(plain, letters.scorer, rows)
    for blocks in (rough, mixed):
        for name, block in exact.items():
            assert all(value.dtype == torch.float32 for value in vars(blocks[name]).values())
            assert (dense(blocks[name]) - dense(block)).norm() < 0.1 * dense(block).norm()


# The evidence


@pytest.fixture
def found(model, letters, monkeypatch):
    monkeypatch.setattr(factors, "FULL_UP_TO", 8)
    batch = letters.scorer.collate(letters.scorer.encode(letters.task.train))
    return gauss_newton(Slots(model), letters.scorer, [batch], rank=5)


@pytest.fixture
def norm(model):
    return sum(weight.square().sum().item() for weight in Slots(model).weights().values())


@pytest.mark.parametrize("precision", [0.01, 1.0, 50.0])
def test_the_evidence_is_the_dense_one(found, norm, precision):
    expected = found.log_likelihood - precision * norm / 2
    for block in found.blocks.values():
        matrix = dense(block).double()
        prior = precision * torch.eye(len(matrix), dtype=torch.float64)
        volume = torch.logdet(matrix + prior).item() - len(matrix) * math.log(precision)
        expected -= volume / 2
    assert log_evidence(found, norm, precision) == pytest.approx(expected, rel=1e-6)


def test_the_best_precision_is_where_the_evidence_is_largest(found, norm):
    best = best_precision(found, norm)
    for factor in (0.5, 0.9, 1.1, 2.0):
        assert log_evidence(found, norm, best * factor) < log_evidence(found, norm, best)
    values = torch.cat([block.eigenvalues.flatten() for block in found.blocks.values()]).double()
    slope = (values / (values + best)).sum().item() - best * norm
    assert slope == pytest.approx(0, abs=1e-9)


def test_an_evidence_without_maximum_is_refused():
    flat = Curvature({"a": Diagonal(torch.zeros(2, 3))}, 0.0)
    with pytest.raises(ValueError, match="the evidence has no maximum: got curvature of trace 0"):
        best_precision(flat, 1.0)


# What the caller has set, and refusals


def test_nothing_of_the_model_is_changed(model, letters):
    def state():
        parameters = {name: p.requires_grad for name, p in model.named_parameters()}
        hooks = {name: len(m._forward_hooks) for name, m in model.named_modules()}
        return parameters, hooks, {m.training for m in model.modules()}

    weights = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.random.get_rng_state()
    for mode in (True, False):
        model.train(mode)
        before = state()
        blocks_of(model, letters.scorer, [letters.batch])
        assert state() == before
    assert torch.equal(generator, torch.random.get_rng_state())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_are_switched_on_inside_whatever_the_caller_has_set(model, letters):
    model.requires_grad_(False)
    with torch.no_grad():
        blocks = blocks_of(model, letters.scorer, [letters.batch])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(block.eigenvalues.sum() > 0 for block in blocks.values())


def test_what_cannot_be_measured_is_refused(model, linear, letters):
    with pytest.raises(ValueError, match="rank of the large factors must be 1 or more: got 0"):
        blocks_of(model, letters.scorer, [], rank=0)
    message = "12 of 12 slots were not called by any row, such as model.layers.0"
    with pytest.raises(ValueError, match=message):
        blocks_of(model, letters.scorer, [])
    message = "none of the 12 slots was called .*disabled"
    with model.disable_adapter(), pytest.raises(ValueError, match=message):
        blocks_of(model, letters.scorer, [letters.batch])

    def flattened(model, batch):
        return model(batch["x"].flatten(0, 1))[:2]

    message = "head.lora_A sees activations that do not divide into rows"
    with pytest.raises(ValueError, match=message):
        blocks_of(linear, flattened, [{"x": torch.randn(3, 1, 6, dtype=torch.float64)}])
