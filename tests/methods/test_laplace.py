"""Laplace-LoRA against dense algebra, the conjugate linear-Gaussian model, and its own promises."""

import math
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForSequenceClassification

from bayestune.adapters import SIDES, Lora, adapter_weights, slot_names, slots
from bayestune.curvature import (
    Curvature,
    Diagonal,
    best_precision,
    curvature,
    log_evidence,
    semidefinite_root,
)
from bayestune.curvature.ggn import _FullSum, _LowRankSum, softmax_root
from bayestune.forward import Draws
from bayestune.methods import METHODS, MLE, Laplace
from bayestune.methods.laplace import GRID, last_slots
from bayestune.posteriors import (
    KINDS,
    Linearised,
    Point,
    Sampled,
    load_posterior,
    predict,
    save_posterior,
)
from bayestune.posteriors.posterior import Saved
from bayestune.scoring import batches_by_length, make_scorer
from bayestune.training import Training

TRAINING = Training(
    lora=Lora(rank=2, targets=("q_proj", "v_proj")), steps=8, learning_rate=1e-2, progress=False
)


class Linear(nn.Module):
    """f(x) = W·x."""

    def __init__(self, width=6, classes=3):
        super().__init__()
        self.head = nn.Linear(width, classes, bias=False)

    def forward(self, x):
        return self.head(x)


def score(model, batch):
    return model(batch["x"])


def adapted(model, targets, rank=2):
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model.eval()


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return adapted(Linear().double(), ["head"])


@pytest.fixture(params=["letter", "packed", "expanded"])
def scorer(request, llama, byte_level, tiny_task):
    letter = request.param == "letter"
    layout = None if letter else request.param
    return make_scorer(
        llama(), byte_level, tiny_task, "letter" if letter else "text", layout=layout
    )


@pytest.fixture
def letters(llama, byte_level, tiny_task):
    return make_scorer(llama(), byte_level, tiny_task, "letter")


@pytest.fixture
def model(llama):
    return adapted(llama(), ["q_proj", "v_proj", "down_proj"])


def rows_of(scorer, count=3):
    batch = scorer.collate(scorer.encode(scorer.task.evaluation[:count]))
    batch.pop("labels")
    return batch


def batches(scorer, questions, size):
    return [batch for _, batch in batches_by_length(scorer, scorer.encode(questions), size)]


def jacobians(model, scorer, batch):
    """(N, C, out, in) by slot name: one backward pass for each logit, in the weights themselves."""
    names, modules = list(slots(model)), slots(model).values()
    logits = scorer(model.eval(), batch)
    weights = [module.weight for module in modules]
    found = [
        [
            torch.autograd.grad(logit, weights, retain_graph=True)
            if logit.isfinite()
            else [torch.zeros_like(w) for w in weights]
            for logit in row
        ]
        for row in logits
    ]
    stacked = {
        n: torch.stack([torch.stack([c[i] for c in row]) for row in found])
        for i, n in enumerate(names)
    }
    return logits.detach(), stacked


def hessian(logits):
    p = logits.double().softmax(-1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None]


def dense(block):
    """H (P, P) of a block, its matrix flattened row by row."""
    if isinstance(block, Diagonal):
        return torch.diag(block.values.flatten())
    outer = block.out_vectors * block.out_values @ block.out_vectors.mT
    return torch.kron(outer, block.in_vectors * block.in_values @ block.in_vectors.mT)


def ggn(logits, jacobian):
    flat = jacobian.flatten(2).double()
    return torch.einsum("ncp,ncd,ndq->pq", flat, hessian(logits), flat)


def close(got, expected, tolerance=1e-4):
    scale = expected.abs().max().item()
    torch.testing.assert_close(got.to(expected), expected, atol=tolerance * scale, rtol=0)


# closed forms


def test_the_softmax_hessians_root_is_its_cholesky_factor():
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[1, 3] = logits[2, 1] = -torch.inf
    root = softmax_root(logits)
    torch.testing.assert_close(root @ root.mT, hessian(logits))
    assert (root.triu(1) == 0).all()
    assert (root[1, 3] == 0).all()


def test_the_root_of_a_row_that_the_model_is_sure_of_is_finite():
    root = softmax_root(
        torch.tensor([[500.0, 0.0, -500.0], [-500.0, 0.0, 500.0], [0.0, -torch.inf, -torch.inf]])
    )
    assert root.isfinite().all()
    assert root[2].abs().max() == 0


def test_the_semidefinite_root():
    matrices = torch.randn(6, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrices = matrices @ matrices.mT
    torch.testing.assert_close(semidefinite_root(matrices), torch.linalg.cholesky(matrices))
    singular = matrices[..., :2] @ matrices[..., :2].mT
    singular[:, 3] = singular[:, :, 3] = 0
    root = semidefinite_root(singular)
    torch.testing.assert_close(root @ root.mT, singular, atol=1e-7, rtol=1e-7)
    assert (root[:, 3] == 0).all()


# the curvature


@pytest.mark.parametrize("structure", ["kfac", "diagonal"])
def test_one_row_of_one_token_is_exact(linear, structure):
    batch = {"x": torch.randn(1, 6, dtype=torch.float64)}
    blocks = curvature(linear, score, [batch], structure=structure).blocks
    logits, jacobian = jacobians(linear, score, batch)
    assert set(blocks) == {"head.lora_A", "head.lora_B"}
    for name, block in blocks.items():
        expected = ggn(logits, jacobian[name])
        close(
            dense(block),
            torch.diag(expected.diag()) if structure == "diagonal" else expected,
            1e-10,
        )


def test_kfac_is_exact_where_all_rows_have_the_same_input(linear):
    rows = {"x": torch.randn(1, 6, dtype=torch.float64).repeat(5, 1)}
    batches_of_rows = [{"x": rows["x"][:2]}, {"x": rows["x"][2:]}]
    blocks = curvature(linear, score, batches_of_rows).blocks
    logits, jacobian = jacobians(linear, score, rows)
    for name, block in blocks.items():
        close(dense(block), ggn(logits, jacobian[name]), 1e-10)


def test_kfac_of_different_rows_is_the_product_of_the_mean_factors(linear):
    batch = {"x": torch.randn(5, 6, dtype=torch.float64)}
    block = curvature(linear, score, [batch]).blocks["head.lora_A"]
    slot_b = slots(linear)["head.lora_B"].weight.detach()
    gradients = 2.0 * slot_b  # alpha/r = 2: the gradient of logit c at A's output is row c of s·B
    outer = torch.einsum(
        "cr,ncd,ds->rs", gradients, hessian(score(linear, batch).detach()), gradients
    )
    close(dense(block), torch.kron(outer, batch["x"].mT @ batch["x"]) / 5, 1e-10)


def test_the_diagonal_is_exact_for_sequences(model, scorer):
    batch = rows_of(scorer, 6)
    blocks = curvature(model, scorer, [batch], structure="diagonal").blocks
    logits, jacobian = jacobians(model, scorer, batch)
    assert len(blocks) == 12
    for name, block in blocks.items():
        close(dense(block).diag(), ggn(logits, jacobian[name]).diag(), 1e-4)


def test_kfac_expand_by_its_definition(model, letters):
    batch, seen = rows_of(letters, 4), {}
    names = ["model.layers.0.self_attn.q_proj.lora_A", "model.layers.1.self_attn.q_proj.lora_B"]
    blocks = curvature(model, letters, [batch], names=names).blocks

    def keep(module, inputs, output):
        seen[module] = inputs[0], output

    hooks = [slots(model)[name].register_forward_hook(keep) for name in names]
    logits = letters(model, batch)
    for hook in hooks:
        hook.remove()
    for name in names:
        inputs, output = seen[slots(model)[name]]
        one_hot = torch.eye(4)[:, None] * batch["option_mask"]
        g = torch.stack(
            [torch.autograd.grad(logits, output, w, retain_graph=True)[0] for w in one_hot], 1
        ).double()
        token = (g != 0).any(-1).any(1)
        assert token.sum() == (
            batch["attention_mask"].sum() if "0.self" in name else 4
        )  # at last the last position's
        outer = torch.einsum("nctr,ncd,ndts->rs", g, hessian(logits.detach()), g)
        a = inputs.detach()[token].double()
        close(dense(blocks[name]), torch.kron(outer, a.mT @ a) / token.sum())


def test_any_root_of_the_hessian_gives_the_same(model, scorer):
    def square(logits):
        p = logits.detach().softmax(-1)
        return torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None]

    batch = rows_of(scorer)
    for structure in ("kfac", "diagonal"):
        ours = curvature(model, scorer, [batch], structure=structure).blocks
        theirs = curvature(model, scorer, [batch], structure=structure, root=square).blocks
        for name, block in ours.items():
            close(dense(block), dense(theirs[name]))


@pytest.mark.parametrize("structure", ["kfac", "diagonal"])
def test_padding_and_batches_change_nothing(model, scorer, structure):
    rows = scorer.encode(scorer.task.train)
    together = scorer.collate(rows)
    assert len({row["length"] for row in rows}) > 1
    whole = curvature(model, scorer, [together], structure=structure)
    alone = curvature(model, scorer, [scorer.collate([row]) for row in rows], structure=structure)
    assert whole.log_likelihood == pytest.approx(alone.log_likelihood, rel=1e-5)
    for name, block in whole.blocks.items():
        close(dense(block), dense(alone.blocks[name]))


def test_the_log_likelihood_is_the_training_rows(model, letters):
    batch = letters.collate(letters.encode(letters.task.train))
    with torch.no_grad():
        expected = -nn.functional.cross_entropy(
            letters(model, batch), batch["labels"], reduction="sum"
        )
    assert curvature(model, letters, [batch]).log_likelihood == pytest.approx(
        expected.item(), rel=1e-5
    )


# low-rank factors


@pytest.mark.parametrize("rank", [30, 15])
def test_a_low_rank_sum_that_keeps_all_is_the_full_sum(rank):
    generator = torch.Generator().manual_seed(0)
    full, low = _FullSum(30), _LowRankSum(30, rank)
    span = torch.randn(rank, 30, generator=generator, dtype=torch.float64)
    for count in (3, 40, 7, 100):
        rows = torch.randn(count, rank, generator=generator, dtype=torch.float64) @ span
        full.add(rows)
        low.add(rows)
    vectors, values = low.eigen(span)
    assert vectors.shape == (30, rank)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(rank, dtype=torch.float64))
    close(vectors * values @ vectors.mT, full.total, 1e-9)


def test_a_low_rank_sum_keeps_the_leading_directions():
    generator = torch.Generator().manual_seed(0)
    scales = 10 * 0.8 ** torch.arange(200.0)
    turn = torch.linalg.qr(torch.randn(200, 200, generator=generator)).Q
    full, low = _FullSum(200), _LowRankSum(200, 10)
    for _ in range(30):
        rows = torch.randn(60, 200, generator=generator) * scales @ turn
        full.add(rows)
        low.add(rows)
    vectors, values = low.eigen(turn)
    exact = torch.linalg.eigvalsh(full.total).flip(0)[:10]
    torch.testing.assert_close(values, exact, rtol=0.01, atol=0)
    assert ((full.total @ vectors - vectors * values).norm(dim=0) / values).max() < 0.1


def test_a_sum_of_no_rows_is_zero():
    like = torch.zeros(0)
    for empty in (_FullSum(4), _LowRankSum(40, 10)):
        assert empty.eigen(like)[1].sum() == 0


def test_low_rank_blocks_of_a_model_are_near_the_full_ones(model, letters):
    rows = [letters.collate([row]) for row in letters.encode(letters.task.train)]
    full = curvature(model, letters, rows).blocks
    low = curvature(model, letters, rows, rank=20, full_up_to=20).blocks
    assert low["model.layers.0.mlp.down_proj.lora_A"].in_vectors.shape == (64, 20)
    for name, block in full.items():
        got, expected = dense(low[name]).double(), dense(block).double()
        assert (got - expected).norm() < 0.05 * expected.norm()


# the linear-Gaussian model: Laplace is the posterior


@pytest.fixture
def conjugate(linear):
    """y = W0·x + s·B·A·x + σ·noise in A alone: features Φ (N, C, P) and targets over W0·x."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    slot_b = 2.0 * slots(linear)["head.lora_B"].weight.detach()
    features = torch.einsum("cr,nk->ncrk", slot_b, x).flatten(2)
    with torch.no_grad(), linear.disable_adapter():
        return x, y, features, y - linear(x)


STD, PRECISION = 0.7, 3.0


@pytest.fixture
def laplace(linear, conjugate):
    x, _, features, rest = conjugate
    flat = features.flatten(0, 1)
    precision = flat.mT @ flat / STD**2 + PRECISION * torch.eye(12, dtype=torch.float64)
    mean = torch.linalg.solve(precision, flat.mT @ rest.flatten() / STD**2)
    with torch.no_grad():
        slots(linear)["head.lora_A"].weight.copy_(mean.view(2, 6))

    def root(logits):
        return torch.eye(3, dtype=logits.dtype).expand(len(logits), 3, 3) / STD

    found = curvature(
        linear, score, [{"x": x[:13]}, {"x": x[13:]}], names=["head.lora_A"], root=root
    )
    return found, precision, mean


def test_on_a_quadratic_it_is_the_true_posterior(linear, laplace, conjugate):
    found, precision, mean = laplace
    new = torch.randn(4, 6, dtype=torch.float64)
    posterior = Linearised(linear, score, found.blocks, PRECISION)
    close(dense(found.blocks["head.lora_A"]) + PRECISION * torch.eye(12), precision, 1e-10)
    slot_b = 2.0 * slots(linear)["head.lora_B"].weight.detach()
    features = torch.einsum("cr,nk->ncrk", slot_b, new).flatten(2)
    expected = torch.einsum("ncp,pq,ndq->ncd", features, torch.linalg.inv(precision), features)
    mu, covariance = posterior.moments({"x": new})
    torch.testing.assert_close(covariance.double(), expected, atol=1e-5, rtol=1e-5)
    with linear.disable_adapter():
        torch.testing.assert_close(
            mu, (linear(new) + features @ mean).detach(), atol=1e-5, rtol=1e-5
        )


def test_on_a_quadratic_the_evidence_is_the_marginal_likelihood(linear, laplace, conjugate):
    found, _, mean = laplace
    x, y, features, rest = conjugate
    flat, eye = features.flatten(0, 1), torch.eye(60, dtype=torch.float64)
    with torch.no_grad():
        likelihood = torch.distributions.Normal(linear(x), STD).log_prob(y).sum().item()
    marginal = torch.distributions.MultivariateNormal(
        torch.zeros(60, dtype=torch.float64), STD**2 * eye + flat @ flat.mT / PRECISION
    )
    ours = log_evidence(Curvature(found.blocks, likelihood), mean.square().sum().item(), PRECISION)
    assert ours == pytest.approx(marginal.log_prob(rest.flatten()).item(), rel=1e-9)


# the evidence


@pytest.fixture
def found(model, letters):
    return curvature(model, letters, batches(letters, letters.task.train, 4), rank=5, full_up_to=8)


def test_the_evidence_is_the_dense_one(found, model):
    norm = sum(weight.square().sum().item() for weight in adapter_weights(model).values())
    for precision in (0.01, 1.0, 50.0):
        expected = found.log_likelihood - precision * norm / 2
        for block in found.blocks.values():
            matrix = dense(block).double()
            prior = precision * torch.eye(len(matrix), dtype=torch.float64)
            expected += (
                len(matrix) * math.log(precision) - torch.logdet(matrix + prior).item()
            ) / 2
        assert log_evidence(found, norm, precision) == pytest.approx(expected, rel=1e-6)


def test_the_best_precision_is_where_the_slope_vanishes_and_adam_ends(found, model):
    norm = sum(weight.square().sum().item() for weight in adapter_weights(model).values())
    best = best_precision(found, norm)

    def evidence(log_precision):
        values = torch.cat(
            [block.eigenvalues.flatten() for block in found.blocks.values()]
        ).double()
        precision = log_precision.exp()
        return -precision * norm / 2 - (values / precision).log1p().sum() / 2

    at_best = torch.tensor(math.log(best), dtype=torch.float64, requires_grad=True)
    evidence(at_best).backward()
    assert abs(at_best.grad.item()) < 1e-9
    for factor in (0.5, 0.9, 1.1, 2.0):
        assert log_evidence(found, norm, best * factor) < log_evidence(found, norm, best)
    start = torch.zeros((), dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([start], lr=0.1, maximize=True)
    for _ in range(100):
        adam.zero_grad()
        evidence(start).backward()
        adam.step()
    assert start.item() == pytest.approx(math.log(best), abs=0.05)


# predictions


@pytest.mark.parametrize("settings", [{}, {"rank": 3, "full_up_to": 8}, {"structure": "diagonal"}])
def test_the_covariance_is_the_dense_one(model, scorer, settings):
    blocks = curvature(model, scorer, batches(scorer, scorer.task.train, 4), **settings).blocks
    batch = rows_of(scorer)
    logits, jacobian = jacobians(model, scorer, batch)
    expected = torch.zeros(3, 4, 4, dtype=torch.float64)
    for name, block in blocks.items():
        flat, matrix = jacobian[name].flatten(2).double(), dense(block).double()
        inverse = torch.linalg.inv(matrix + 0.1 * torch.eye(len(matrix), dtype=torch.float64))
        expected += torch.einsum("ncp,pq,ndq->ncd", flat, inverse, flat)
    posterior = Linearised(model, scorer, blocks, 0.1)
    mean, covariance = posterior.moments(batch)
    torch.testing.assert_close(mean, logits)
    close(covariance, expected)
    _, several = posterior.moments(batch, [5.0, 0.1])
    close(several[1], expected)
    assert (several[0].diagonal(dim1=-2, dim2=-1) <= covariance.diagonal(dim1=-2, dim2=-1)).all()


def test_a_classification_head(llama):
    base = LlamaForSequenceClassification(llama(num_labels=3).config)
    model = adapted(base, ["q_proj", "v_proj"])
    batch = {"input_ids": torch.randint(3, 400, (4, 7), generator=torch.Generator().manual_seed(0))}
    batch["attention_mask"] = (torch.arange(7) < torch.tensor([[7], [5], [4], [2]])).long()
    batch["input_ids"] *= batch["attention_mask"]  # the padding token is 0

    def classify(model, batch):
        return model(**batch).logits

    logits, jacobian = jacobians(model, classify, batch)
    found = curvature(model, classify, [batch], structure="diagonal")
    expected = 0
    for name, block in found.blocks.items():
        close(dense(block).diag(), ggn(logits, jacobian[name]).diag())
        flat = jacobian[name].flatten(2)
        expected = expected + torch.einsum(
            "ncp,p,ndp->ncd", flat, 1 / (block.values.flatten() + 0.5), flat
        )
    close(Linearised(model, classify, found.blocks, 0.5, max_rows=3).moments(batch)[1], expected)


@pytest.fixture
def posterior(model, letters, found):
    return Linearised(model, letters, found.blocks, 0.05)


def test_draws_have_the_moments(posterior, letters):
    batch = rows_of(letters, 4)
    mean, covariance = posterior.moments(batch)
    draws, present = posterior.logits(batch, Draws(4000)), batch["option_mask"]
    assert draws.shape == (4000, 4, 4)
    assert torch.equal(draws.isfinite().all(0), present)
    var = covariance.diagonal(dim1=-2, dim2=-1)
    assert torch.equal(var > 0, present)
    error = (draws.mean(0) - mean)[present] / (var[present] / 4000).sqrt()
    assert error.abs().max() < 4.5
    centred = torch.where(present, draws - mean, 0.0)
    products = torch.einsum("snc,snd->ncd", centred, centred) / 4000
    spread = ((var[:, :, None] * var[:, None] + covariance.square()) / 4000).sqrt()
    assert ((products - covariance).abs() <= 4.5 * spread + 1e-12).all()


def test_draws_do_not_depend_on_batch_chunks_or_their_number(posterior, letters):
    batch = rows_of(letters, 6)
    whole = posterior.logits(batch, Draws(5, seed=2))
    torch.testing.assert_close(posterior.logits(batch, Draws(2, seed=2)), whole[:2])
    for changes in ({"max_rows": 1}, {"max_rows": 5}, {"max_bytes": 1}):
        torch.testing.assert_close(
            replace(posterior, **changes).logits(batch, Draws(5, seed=2)), whole
        )
    rows = letters.encode(letters.task.evaluation)
    narrow = next(i for i, row in enumerate(rows) if row["options"] == 3)
    alone = posterior.logits(letters.collate([rows[narrow]]), Draws(5, seed=2))
    torch.testing.assert_close(alone[:, 0], whole[:, narrow, :3], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(posterior.logits(batch, Draws(5, seed=3))[..., :3], whole[..., :3])


def test_rows_of_several_sequences_are_split_whole(model, llama, byte_level, tiny_task):
    expanded = make_scorer(llama(), byte_level, tiny_task, "text", layout="expanded")
    blocks = curvature(model, expanded, batches(expanded, tiny_task.train, 4)).blocks
    batch = rows_of(expanded, 6)
    whole = Linearised(model, expanded, blocks, 1.0, max_rows=6).moments(batch)
    torch.testing.assert_close(
        Linearised(model, expanded, blocks, 1.0, max_bytes=1).moments(batch), whole
    )


def test_no_draws_is_the_mean(posterior, model, letters):
    batch = rows_of(letters)
    assert torch.equal(
        posterior.logits(batch, Draws(0)), Point(model, letters).logits(batch, Draws(0))
    )


def test_a_larger_prior_precision_is_surer(posterior, letters):
    batch = rows_of(letters)
    information = [
        predict(replace(posterior, prior_precision=value), batch, 50).mutual_information
        for value in (0.01, 1.0, 100.0)
    ]
    assert (information[0] > information[1]).all()
    assert (information[1] > information[2]).all()


@pytest.mark.parametrize("settings", [{"rank": 3, "full_up_to": 8}, {"structure": "diagonal"}])
def test_sampled_draws_have_the_moments(model, letters, settings):
    blocks = curvature(model, letters, [rows_of(letters, 6)], **settings).blocks
    name, precision = "model.layers.0.self_attn.v_proj.lora_B", 0.02
    posterior = Sampled(model, letters, {name: blocks[name]}, precision)
    mean = adapter_weights(model)[name]
    matrix = dense(blocks[name])
    covariance = torch.linalg.inv(matrix + precision * torch.eye(len(matrix)))
    draws = torch.stack([posterior.draw(i)[name] for i in range(3000)])
    errors = (draws - mean).flatten(1)
    assert (errors.mean(0) / (covariance.diag() / 3000).sqrt()).abs().max() < 4.5
    along = torch.linalg.eigh(matrix).eigenvectors
    variances = torch.einsum("sp,pq->sq", errors, along).square().mean(0)
    expected = (along.mT @ covariance @ along).diag()
    assert (variances / expected - 1).abs().max() < 4.5 * math.sqrt(2 / 3000)


def test_sampled_draws_run_as_adapters(model, letters, found):
    posterior, batch = Sampled(model, letters, found.blocks, 1.0), rows_of(letters)
    logits = posterior.logits(batch, Draws(3, seed=1))
    weights = posterior.draw(2, seed=1)
    assert weights.keys() == slots(model).keys()
    kept = {name: weight.clone() for name, weight in adapter_weights(model).items()}
    with torch.no_grad():
        for name, slot in slots(model).items():
            slot.weight.copy_(weights[name])
        torch.testing.assert_close(letters(model, batch), logits[2], atol=1e-5, rtol=1e-5)
        for name, slot in slots(model).items():
            slot.weight.copy_(kept[name])
    assert not hasattr(Linearised(model, letters, found.blocks, 1.0), "draw")


def test_small_sampled_posteriors_agree_with_the_linearised_one(model, letters, found):
    batch, blocks = rows_of(letters), found.blocks
    _, covariance = Linearised(model, letters, blocks, 1e5).moments(batch)
    draws = Sampled(model, letters, blocks, 1e5).logits(batch, Draws(800))
    present = batch["option_mask"]
    ratio = draws.var(0)[present] / covariance.diagonal(dim1=-2, dim2=-1)[present]
    assert (ratio - 1).abs().max() < 4.5 * math.sqrt(2 / 800)


# what the caller has set


def test_nothing_of_the_model_is_changed(model, letters, found):
    batch = rows_of(letters)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    grads = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    generator = torch.random.get_rng_state()
    for mode in (True, False):
        model.train(mode)
        curvature(model, letters, [batch], rank=3, full_up_to=8)
        Linearised(model, letters, found.blocks, 1.0).logits(batch, Draws(2))
        assert all(module.training is mode for module in model.modules())
    assert torch.equal(generator, torch.random.get_rng_state())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert grads == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert hooks == {name: len(module._forward_hooks) for name, module in model.named_modules()}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_are_switched_on_inside_whatever_the_caller_has_set(posterior, model, letters):
    batch = rows_of(letters)
    expected = posterior.moments(batch)
    model.requires_grad_(False)
    with torch.no_grad():
        torch.testing.assert_close(posterior.moments(batch), expected)
        blocks = curvature(model, letters, [batch]).blocks
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(block.eigenvalues.sum() > 0 for block in blocks.values())
    assert not any(value.requires_grad for value in expected)


def test_bfloat16_weights_and_autocast(llama, letters):
    rows = batches(letters, letters.task.train, 4)
    plain = adapted(llama(), ["q_proj", "v_proj"])
    half = adapted(llama().bfloat16(), ["q_proj", "v_proj"])
    half.load_state_dict(
        {**half.state_dict(), **{n: v for n, v in plain.state_dict().items() if "lora" in n}}
    )
    exact = curvature(plain, letters, rows).blocks
    batch, expected = (
        rows_of(letters),
        Linearised(plain, letters, exact, 0.1).moments(rows_of(letters))[1],
    )
    rough = curvature(half, letters, rows).blocks
    with torch.autocast("cpu", torch.bfloat16):
        mixed = curvature(plain, letters, rows).blocks
        covariance = Linearised(plain, letters, exact, 0.1).moments(batch)[1]
        weights = Sampled(plain, letters, exact, 0.1).draw(0)
    assert covariance.dtype == torch.float32
    for got in (covariance, Linearised(half, letters, exact, 0.1).moments(batch)[1]):
        assert (got - expected).norm() < 0.05 * expected.norm()
    assert all(
        torch.equal(weight, weights[n])
        for n, weight in Sampled(plain, letters, exact, 0.1).draw(0).items()
    )
    for blocks in (rough, mixed):
        for name, block in exact.items():
            assert all(value.dtype == torch.float32 for value in vars(blocks[name]).values())
            assert (dense(blocks[name]) - dense(block)).norm() < 0.1 * dense(block).norm()


# artefacts


@pytest.mark.parametrize("form", [Linearised, Sampled])
@pytest.mark.parametrize("structure", ["kfac", "diagonal"])
def test_state_and_restore(model, letters, structure, form):
    blocks = curvature(
        model, letters, [rows_of(letters)], structure=structure, rank=3, full_up_to=8
    ).blocks
    posterior = form(model, letters, blocks, 0.3, max_rows=2)
    tensors, facts = posterior.state()
    again = form.restore(Saved(model, letters, {n: v.clone() for n, v in tensors.items()}, facts))
    assert (again.prior_precision, again.max_rows, again.max_bytes) == (0.3, 2, 2**30)
    batch = rows_of(letters)
    assert torch.equal(again.logits(batch, Draws(3)), posterior.logits(batch, Draws(3)))
    assert (again.kind, again.has_mean, again.atoms, again.adapter) == (
        form.kind,
        True,
        form.atoms,
        "default",
    )
    assert (Linearised.atoms, Sampled.atoms) == (1000, None)


def test_the_state_of_another_model_is_refused(posterior, llama, letters):
    tensors, facts = posterior.state()
    other = adapted(llama(), ["q_proj", "v_proj", "down_proj"], rank=4)
    with pytest.raises(
        ValueError, match="curvature of another model or rank: got 12 blocks, 12 of them do not fit"
    ):
        Linearised.restore(Saved(other, letters, tensors, facts))
    with pytest.raises(ValueError, match="got 0 blocks"):
        Linearised.restore(Saved(other, letters, {}, facts))


# the method


@pytest.mark.parametrize("predictive", ["linearised", "sampled"])
def test_fit(llama, scorer, predictive):
    posterior = Laplace(predictive=predictive).fit(llama(), scorer, TRAINING)
    assert type(posterior) is (Sampled if predictive == "sampled" else Linearised)
    batch = rows_of(scorer, 6)
    logits = posterior.logits(batch, Draws(3))
    assert torch.equal(logits.isfinite().all(0), batch["option_mask"])
    assert predict(posterior, batch, 10).mutual_information.max() > 1e-6
    assert set(posterior.blocks) == set(slot_names(posterior.model, SIDES))
    assert posterior.fitted["steps"] == 8
    assert 0 < posterior.fitted["laplace_seconds"] < posterior.fitted["seconds"]
    assert posterior.fitted["prior_precision"] == posterior.prior_precision
    assert math.isfinite(posterior.fitted["log_evidence"])


def test_bf16_training(llama, letters):
    posterior = Laplace().fit(llama(), letters, replace(TRAINING, bf16=True))
    assert posterior.logits(rows_of(letters), Draws(2))[..., :3].isfinite().all()


def test_settings_of_the_fit(llama, letters):
    given = Laplace(base=MLE(), structure="diagonal", prior_precision=2.5).fit(
        llama(), letters, TRAINING
    )
    assert given.prior_precision == 2.5
    assert isinstance(next(iter(given.blocks.values())), Diagonal)
    last = Laplace(layers="last").fit(llama(), letters, TRAINING)
    layer = "model.layers.1.self_attn"
    assert list(last.blocks) == [
        f"{layer}.{part}.{side}" for part in ("q_proj", "v_proj") for side in SIDES
    ]
    assert last_slots(["layers.0.q_proj.lora_A", "lm_head.lora_A", "lm_head.lora_B"]) == [
        "lm_head.lora_A",
        "lm_head.lora_B",
    ]


def test_precision_chosen_on_held_out_rows(llama, tiny_task, byte_level):
    scorer = make_scorer(llama(), byte_level, tiny_task)
    posterior = Laplace(choose="held_out").fit(llama(), scorer, TRAINING)
    batch = scorer.collate(scorer.encode(scorer.task.held_out))
    labels = batch.pop("labels")

    def loss(precision):
        probabilities = predict(
            replace(posterior, prior_precision=precision), batch, 1000
        ).probabilities
        return -probabilities.gather(1, labels[:, None]).log().sum().item()

    assert posterior.prior_precision in GRID
    losses = [loss(precision) for precision in GRID]
    assert loss(posterior.prior_precision) == pytest.approx(min(losses), rel=1e-4)
    none = make_scorer(llama(), byte_level, replace(tiny_task, held_out=()))
    with pytest.raises(ValueError, match="Laplace chooses on held-out rows: got none"):
        Laplace(choose="held_out").fit(llama(), none, TRAINING)


# refusals


def test_a_base_that_is_no_point_is_refused(llama, letters):
    with pytest.raises(
        ValueError,
        match="Laplace builds on a point: got a Gaussian from its base, expected a Point",
    ):
        Laplace(base=METHODS["blob"]()).fit(llama(), letters, TRAINING)


def test_bad_numbers_are_refused(model, letters):
    with pytest.raises(ValueError, match="prior_precision must be positive: got 0"):
        Laplace(prior_precision=0)
    with pytest.raises(ValueError, match="the prior's precision must be positive: got -1"):
        Linearised(model, letters, {}, -1)
    with pytest.raises(ValueError, match="rank of the large factors must be 1 or more: got 0"):
        curvature(model, letters, [], rank=0)


def test_slots_that_are_never_called_are_refused(model, letters):
    with pytest.raises(
        ValueError, match="12 of 12 slots were not called by any row, such as model.layers.0"
    ):
        curvature(model, letters, [])
    with (
        model.disable_adapter(),
        pytest.raises(ValueError, match="none of the 12 slots was called .*disabled"),
    ):
        curvature(model, letters, [rows_of(letters)])


def test_activations_that_are_not_by_row_are_refused(linear):
    def flattened(model, batch):
        return model(batch["x"].flatten(0, 1))[:2]

    with pytest.raises(
        ValueError, match="head.lora_A sees activations that do not divide into rows"
    ):
        curvature(linear, flattened, [{"x": torch.randn(3, 1, 6, dtype=torch.float64)}])


def test_an_evidence_without_maximum_is_refused():
    flat = Curvature({"a": Diagonal(torch.zeros(2, 3))}, 0.0)
    with pytest.raises(ValueError, match="the evidence has no maximum: got curvature of trace 0"):
        best_precision(flat, 1.0)


def test_an_artefact_gives_the_same_logits(llama, letters, tmp_path, monkeypatch):
    for form in (Linearised, Sampled):
        monkeypatch.setitem(KINDS, form.kind, form)
    for predictive in ("linearised", "sampled"):
        posterior = Laplace(predictive=predictive, structure="kfac").fit(llama(), letters, TRAINING)
        folder = save_posterior(posterior, tmp_path / predictive)
        loaded = load_posterior(llama(), folder, letters)
        batch = rows_of(letters)
        torch.testing.assert_close(
            loaded.logits(batch, Draws(3)), posterior.logits(batch, Draws(3))
        )
