"""What logits say under each likelihood, in closed forms and on models; rows as users have them."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Normal
from torch.testing import assert_close
from torch.utils.data import DataLoader, Dataset
from transformers import (
    BertConfig,
    BertForTokenClassification,
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from bayestune import Draws, Gaussian, HeadLogits, LastToken, Refusal, Regression, predict
from bayestune.adapters import base_of
from bayestune.posteriors import Prediction, Reward, Sigmoid
from tiny import CAUSAL, SIZES, causal, converted, tiny_bert

LOG3 = math.log(3)


def of_bert(**changes):
    """A posterior over a tiny encoder with a head."""
    model = converted(tiny_bert(**changes), target_modules=["query"], task_type="SEQ_CLS")
    return Gaussian(model, HeadLogits())


def rows(*lengths):
    torch.manual_seed(4)
    return [{"input_ids": torch.randint(3, 400, (n,)).tolist(), "label": 1} for n in lengths]


# Labels


def test_labels_are_bernoulli_each_by_itself():
    logits = torch.tensor([[[LOG3, 0.0, 9.0]], [[-LOG3, 0.0, 9.0]]])
    found = Sigmoid().predictive(logits, exact=False)
    assert_close(found.probabilities[0, :2], torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert found.choice.tolist() == [[False, False, True]]
    quarter = Bernoulli(torch.tensor(0.25, dtype=torch.float64)).entropy()
    assert_close(found.expected_entropy[0, 0], quarter)
    assert_close(found.total_entropy[0, :2], torch.full((2,), math.log(2), dtype=torch.float64))
    information = 2 * (math.log(2) - quarter.item())
    assert_close(found.mutual_information[0, 0].item(), information)
    assert found.mutual_information[0, 1:].tolist() == pytest.approx([0, 0], abs=1e-12)
    all_there_is = Sigmoid().predictive(logits, exact=True)
    assert_close(all_there_is.mutual_information[0, 0].item(), information / 2)


def test_labels_of_a_model_are_its_sigmoids():
    posterior = of_bert(problem_type="multi_label_classification")
    batch = {"input_ids": torch.arange(3, 27).reshape(2, 12)}
    found = predict(posterior, batch, 5, likelihood="sigmoid")
    probabilities = posterior.logits(batch, Draws(5)).double().sigmoid()
    assert_close(found.probabilities, probabilities.mean(0))
    assert_close(found.expected_entropy, Bernoulli(probabilities).entropy().mean(0))
    assert (found.mutual_information > 0).all()


# Regression


def test_variance_splits_into_noise_and_disagreement():
    logits = torch.tensor([[[1.0, 0.0]], [[3.0, 0.0]]])
    known = Regression(noise_var=torch.tensor([0.25, 4.0]))
    found = known.predictive(logits, exact=False)
    assert found.mean.tolist() == [[2.0, 0.0]]
    assert found.epistemic.tolist() == [[2.0, 0.0]]  # with S − 1
    assert found.total.tolist() == [[2.25, 4.0]]
    assert found.std.tolist() == [[1.5, 2.0]]
    density = Normal(found.mean, found.std).log_prob(torch.tensor([[1.0, 1.0]]))
    assert_close(found.log_density(torch.tensor([[1.0, 1.0]])), density)
    assert known.predictive(logits, exact=True).epistemic.tolist() == [[1.0, 0.0]]
    assert Regression(1.0).predictive(logits[:1], exact=False).epistemic.tolist() == [[0.0, 0.0]]


def test_a_head_may_give_the_variance():
    logits = torch.tensor([[[1.0, math.log(2.0)]], [[3.0, math.log(4.0)]]])
    found = Regression(head_gives_variance=True).predictive(logits, exact=False)
    assert found.mean.tolist() == [[2.0]]
    assert_close(found.aleatoric, torch.tensor([[3.0]], dtype=torch.float64))
    assert found.epistemic.tolist() == [[2.0]]
    # the law of total variance on samples of the mixture
    torch.manual_seed(0)
    samples = Normal(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 4.0]).sqrt()).sample((200_000,))
    exact = Regression(head_gives_variance=True).predictive(logits, exact=True)
    assert samples.var().item() == pytest.approx(exact.total.item(), rel=0.02)


def test_the_noise_is_fitted_as_what_the_draws_leave_over():
    torch.manual_seed(0)
    num_rows = 20_000
    truth = torch.randn(num_rows, 1)
    draws = truth + 0.5 * torch.randn(8, num_rows, 1)  # the posterior's own spread is 0.5
    targets = truth[:, 0] + 0.5 * torch.randn(num_rows) + 1.5 * torch.randn(num_rows)
    plain = Regression().predictive(draws, exact=False)
    # y − mean has the noise, the truth's place among draws, and the mean's own error
    fitted = Regression.fitted(plain, targets)
    assert fitted.noise_var.item() == pytest.approx(1.5**2 + 0.25 / 8, rel=0.03)
    assert Regression.fitted(plain, plain.mean[:, 0]).noise_var.item() == 0
    with pytest.raises(ValueError, match=r"got a Regression\(\) without noise_var, expected one"):
        _ = plain.total


def test_a_missing_target_is_left_out_of_the_noise():
    logits = torch.randn(4, 6, 2, dtype=torch.float64)
    prediction = Regression().predictive(logits, exact=True)
    targets = torch.randn(6, 2, dtype=torch.float64)
    targets[:2, 1] = math.nan
    found = Regression.fitted(prediction, targets).noise_var
    known = Regression().predictive(logits[:, 2:], exact=True)
    assert found[0] == Regression.fitted(prediction, targets.nan_to_num(0.0)).noise_var[0]
    assert_close(found[1], Regression.fitted(known, targets[2:]).noise_var[1])
    targets[:, 1] = math.nan
    with pytest.raises(Refusal, match=r"got NaN in all 6 rows of the targets \[1\]"):
        Regression.fitted(prediction, targets)


def test_a_regression_head_predicts_numbers_and_one_logit_is_no_class():
    posterior = of_bert(num_labels=1)
    batch = {"input_ids": torch.arange(3, 27).reshape(2, 12)}
    logits = posterior.logits(batch, Draws(6)).double()
    found = predict(posterior, batch, 6, likelihood="regression")
    assert_close(found.mean, logits.mean(0))
    assert_close(found.epistemic, logits.var(0))
    assert found.aleatoric is None
    assert predict(posterior, batch, 6, likelihood=Regression(0.5)).total.shape == (2, 1)
    message = r'predict\(…, likelihood="sigmoid"\), "regression" or "reward"'
    with pytest.raises(ValueError, match=message):
        predict(posterior, batch, 6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Regression(1.0, head_gives_variance=True), "the noise is said twice"),
        (lambda: Regression(-1.0), "got noise_var=-1.0"),
        (
            lambda: Regression(head_gives_variance=True).predictive(
                torch.zeros(2, 3, 3), exact=False
            ),
            "come in pairs: got 3 outputs, expected an even number",
        ),
        (
            lambda: (
                Regression(1.0)
                .predictive(torch.zeros(2, 3, 2), exact=False)
                .log_density(torch.zeros(3))
            ),
            r"got targets of shape \(3,\), expected \(3, 2\)",
        ),
    ],
)
def test_regressions_that_make_no_sense_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Rewards


def rewards(values):
    return Reward().predictive(torch.tensor(values)[..., None], exact=False)


def test_rewards_are_preferred_as_bradley_and_terry_say():
    one = rewards([[LOG3, 0.0], [-LOG3, 1.0]])
    other = rewards([[0.0, 0.0], [0.0, 1.0]])
    found = one.preferred(other)
    assert_close(found.probabilities[:, 0], torch.tensor([0.5, 0.5], dtype=torch.float64))
    quarter = Bernoulli(torch.tensor(0.25, dtype=torch.float64)).entropy().item()
    assert found.mutual_information[0].item() == pytest.approx(2 * (math.log(2) - quarter))
    assert found.mutual_information[1].item() == pytest.approx(0, abs=1e-12)
    sure = rewards([[LOG3], [LOG3]]).preferred(rewards([[0.0], [0.0]]))
    assert sure.probabilities[0].tolist() == pytest.approx([0.75, 0.25])


def test_the_best_of_n_is_not_the_one_that_draws_disagree_on():
    found = rewards([[5.0, 2.0, 0.0, 1.0], [1.0, 2.0, 0.0, 1.0]])
    assert_close(found.mean, torch.tensor([3.0, 2.0, 0.0, 1.0], dtype=torch.float64))
    assert_close(found.std[0].item(), math.sqrt(8))
    assert_close(found.lower(2.0)[:2], torch.tensor([3 - 2 * 8**0.5, 2.0], dtype=torch.float64))
    assert found.best_of(2, k=0).tolist() == [0, 1]
    assert found.best_of(2, k=1).tolist() == [1, 1]


def test_a_constant_of_each_draw_changes_no_centred_choice():
    torch.manual_seed(0)
    values = torch.randn(6, 12)
    shifted = values + 50 * torch.randn(6, 1)
    chosen = rewards(values.tolist()).best_of(4, k=1, centred=True)
    assert torch.equal(rewards(shifted.tolist()).best_of(4, k=1, centred=True), chosen)
    best = (values - values.unflatten(1, (3, 4)).mean(-1).repeat_interleave(4, 1)).double()
    lower = (best.mean(0) - best.std(0)).unflatten(0, (3, 4))
    assert torch.equal(chosen, lower.argmax(-1))


def test_reward_heads_of_decoders_work_and_others_are_refused():
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1))
    model = converted(base, task_type="SEQ_CLS")
    posterior = Gaussian(model, HeadLogits())
    batch = {"input_ids": torch.arange(3, 27).reshape(2, 12), "labels": torch.ones(2)}
    found = predict(posterior, batch, 4, likelihood="reward")
    assert found.rewards.shape == (4, 2)
    assert (found.std > 0).all()
    with pytest.raises(ValueError, match=r"got logits of shape \(3, 2, 3\), expected \(S, N, 1\)"):
        predict(of_bert(), batch, 3, likelihood="reward")
    with pytest.raises(ValueError, match="got 2 and n=3, expected a multiple"):
        found.best_of(3)
    fewer = predict(posterior, batch, 2, likelihood="reward")
    with pytest.raises(ValueError, match=r"got \(4, 2\) and \(2, 2\) rewards"):
        found.preferred(fewer)


def test_nothing_to_predict_is_refused():
    posterior = of_bert()
    batch = {"input_ids": torch.arange(3, 13).reshape(2, 5)}
    with pytest.raises(Refusal, match=r"got input_ids of shape \(0, 5\), expected a row or more"):
        predict(posterior, {"input_ids": batch["input_ids"][:0]})
    with pytest.raises(Refusal, match="nothing to predict: got None"):
        predict(posterior, None)
    with pytest.raises(Refusal, match="unknown likelihood: got <class"):
        predict(posterior, batch, likelihood=Regression)
    with pytest.raises(Refusal, match=r"got count=2.5, first=0, expected"):
        predict(posterior, batch, 2.5)
    with pytest.raises(Refusal, match=r"a variance for each target: got \(2,\)"):
        predict(posterior, batch, likelihood=Regression(torch.ones(2)))


def test_an_unknown_likelihood_is_refused():
    batch = {"input_ids": torch.arange(3, 27).reshape(2, 12)}
    with pytest.raises(ValueError, match="got 'poisson', expected one of softmax, sigmoid, regr"):
        predict(of_bert(), batch, 2, likelihood="poisson")


# Tokens


def test_tokens_are_classified_each_and_padding_is_nothing():
    torch.manual_seed(0)
    base = BertForTokenClassification(BertConfig(**SIZES, num_labels=4))
    model = converted(base, target_modules=["query"], task_type="TOKEN_CLS")
    posterior = Gaussian(model, HeadLogits())
    found = predict(posterior, rows(5, 9, 7), 3)
    assert found.probabilities.shape == (3, 9, 4)
    for place, row in enumerate(rows(5, 9, 7)):
        alone = predict(posterior, {"input_ids": torch.tensor([row["input_ids"]])}, 3)
        length = len(row["input_ids"])
        for name in ("probabilities", "total_entropy", "mutual_information"):
            values = getattr(found, name)[place]
            assert_close(values[:length], getattr(alone, name)[0], rtol=1e-4, atol=1e-5)
            assert not values[length:].any()
    assert (found.total_entropy[0, :5] > 0).all()


def test_padding_hides_no_broken_logits():
    logits = torch.zeros(2, 3, 4)
    logits[0, 1] = torch.nan
    assert Prediction.of(logits).probabilities.isnan().any(-1).tolist() == [False, True, False]


# Rows as users have them


class Rows(Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {**self.rows[index], "text": "not for the model"}


def test_a_dataset_and_a_loader_go_in_as_they_are(byte_level):
    posterior = of_bert()
    given = rows(*range(4, 15))
    collate = DataCollatorWithPadding(byte_level)
    whole = collate(given)
    expected = predict(posterior, dict(whole), 3).probabilities
    for inputs in (Rows(given), given, DataLoader(given, batch_size=4, collate_fn=collate)):
        found = predict(posterior, inputs, 3)
        assert_close(found.probabilities, expected, rtol=1e-4, atol=1e-5)
    batches = ({"input_ids": torch.tensor([row["input_ids"]])} for row in given)
    assert_close(predict(posterior, batches, 3).probabilities, expected, rtol=1e-4, atol=1e-5)


def test_a_dataset_of_the_hubs_library_goes_in_as_it_is():
    datasets = pytest.importorskip("datasets")
    posterior = of_bert()
    given = rows(4, 9, 6)
    found = predict(posterior, datasets.Dataset.from_list(given), 3)
    assert_close(found.probabilities, predict(posterior, given, 3).probabilities)


def test_rows_that_cannot_be_put_together_are_refused():
    def own(model, batch):
        return model(**batch).logits

    posterior = of_bert()
    message = "rows of 4 to 9 tokens would be padded, and it is not known where the scorer reads"
    with pytest.raises(ValueError, match=message):
        predict(posterior.on(own), Rows(rows(4, 9)), 2)
    assert predict(posterior.on(own), rows(6, 6), 2).probabilities.shape[0] == 2
    with pytest.raises(ValueError, match="a row of the dataset names its tensors: got a tuple"):
        predict(posterior, [(1, 2)], 2)
    with pytest.raises(ValueError, match="a batch of the loader names its tensors: got a list"):
        predict(posterior, DataLoader([(1, 2)]), 2)
    with pytest.raises(ValueError, match=r"got \['answer', 'question'\], expected such as input"):
        predict(posterior, [{"question": "?", "answer": "!"}], 2)
    with pytest.raises(ValueError, match="got no rows, expected one or more"):
        predict(posterior, [], 2)


def test_embeddings_of_different_lengths_are_masked():
    posterior = of_bert(initializer_range=0.2)
    torch.manual_seed(4)
    given = [{"inputs_embeds": torch.randn(n, 32)} for n in (9, 4)]
    together = predict(posterior, given, 3).probabilities
    assert_close(together[1:], predict(posterior, given[1:], 3).probabilities)


def test_a_decoders_tokens_are_padded_and_masked_as_an_encoders_are():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    base = T5ForConditionalGeneration(T5Config(vocab_size=60, **sizes))
    model = converted(base, target_modules=["q", "v"], task_type=None)
    posterior = Gaussian(model, LastToken([11, 12]))
    given = []
    for length in (4, 7, 2):
        ids = torch.randint(3, 60, (length,))
        given.append({"input_ids": ids, "decoder_input_ids": ids.flip(0)[: length // 2]})
    together = predict(posterior, given, 3).probabilities
    alone = torch.cat([predict(posterior, [row], 3).probabilities for row in given])
    assert_close(together, alone, rtol=1e-4, atol=1e-5)


RAGGED = {
    "sounds": [{"input_values": torch.zeros(n)} for n in (600, 400)],
    "spectrograms": [{"input_features": torch.zeros(n, 8)} for n in (6, 4)],
    "options": [{"input_ids": torch.zeros(n, 5, dtype=torch.long)} for n in (4, 3)],
    "patches": [
        {"input_ids": torch.zeros(t, dtype=torch.long), "pixel_values": torch.zeros(n, 8)}
        for t, n in ((5, 6), (7, 4))
    ],
}


@pytest.mark.parametrize("kind", RAGGED)
def test_rows_whose_padding_no_mask_would_tell_are_refused(kind, monkeypatch):
    posterior = of_bert()
    names = ("input_values", "input_features", "pixel_values")

    def forward(self, input_ids=None, input_values=None, input_features=None, pixel_values=None):
        raise AssertionError("the rows went in")

    monkeypatch.setattr(type(base_of(posterior.model)), "forward", forward)
    name = next((name for name in names if name in RAGGED[kind][0]), "input_ids")
    with pytest.raises(ValueError, match=rf"cannot be stacked: got {name} of the shapes \[\("):
        predict(posterior, RAGGED[kind], 2)


# The last real token


@pytest.mark.parametrize("name", CAUSAL)
def test_the_last_real_token_is_found_on_either_side(name):
    posterior = Gaussian(converted(causal(CAUSAL[name])), LastToken([11, 12, 13]))
    given = [torch.tensor(row["input_ids"]) for row in rows(5, 9, 7)]
    alone = torch.cat([posterior.logits({"input_ids": ids[None]}, Draws(3)) for ids in given], 1)
    plain = posterior.on(lambda model, batch: model(**batch).logits[:, -1, [11, 12, 13]])
    assert_close(plain.logits({"input_ids": given[0][None]}, Draws(3)), alone[:, :1])
    for side in ("left", "right"):
        ids = torch.zeros(3, 9, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(given):
            columns = slice(9 - len(row), 9) if side == "left" else slice(0, len(row))
            ids[place, columns] = row
            mask[place, columns] = 1
        batch = {"input_ids": ids, "attention_mask": mask, "labels": ids}
        for draws in (Draws(3), Draws(3, max_rows=1)):
            assert_close(posterior.logits(batch, draws), alone, rtol=1e-4, atol=1e-4)
        if side == "right":
            with pytest.raises(ValueError, match="rows that end apart: got rows padded on the rig"):
                posterior.logits(batch, Draws(2, shared_prefix=2))
    with pytest.raises(ValueError, match=r"a choice is between tokens: got \[4\], expected two"):
        LastToken([4])
