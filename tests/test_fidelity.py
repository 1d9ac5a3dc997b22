"""What is offered of BLoB's public code: its prompts, its settings, its noise by token."""

import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from bayestune.adapters import GaussianLinear, Slots, bayesify
from bayestune.cli.parser import make_parser
from bayestune.data import TASKS, Question, Task
from bayestune.data.prompts import AUTHORS_ARC, AUTHORS_BOOLQ, AUTHORS_OPENBOOK, CHOICES, TRUE_FALSE
from bayestune.forward import Draws
from bayestune.methods import METHODS, AuthorsBLoB, BLoB, PosteriorScale
from bayestune.posteriors import Gaussian, Mixture, Saved, TokenNoise, predict
from bayestune.scoring import LetterScorer, make_scorer
from bayestune.training import Training

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs/faithful").glob("*.yaml"))
HEAD = "Return the label of the correct answer for the question below.\n\n"
SKY = Question("sky", "Which is red?", ("sky", "blood", "grass"), 1)
DRAWS = 600


# Settings


SETTINGS = {
    "steps": 5000,
    "batch_size": 4,
    "learning_rate": 1e-4,
    "warmup_ratio": 0.06,
    "lora.rank": 8,
    "lora.alpha": 16,
    "lora.dropout": 0.0,
    "lora.targets": ("q_proj", "v_proj", "lm_head"),
}
NOISY = {
    "prior_std": 0.2,
    "init_root_std": 0.05,
    "noise": "token",
    "final_std": None,
    "kl_lr": 0.01,
    "schedule": "bursts",
    "std_optimizer": "sgd",
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_faithful_preset_is_the_authors_run(path):
    arguments = ["compare", "--config", str(path), "--output", "out"]
    options = make_parser().parse_args(arguments).compare
    assert {name: options[name] for name in SETTINGS} == SETTINGS
    for method in ("blob", "blob_authors"):
        assert {name: options[f"{method}.{name}"] for name in NOISY} == NOISY
    authors = "" if path.stem.startswith("winogrande") else "_authors"
    assert options.task == f"{path.stem}{authors}"
    assert options.task in TASKS
    assert set(options.methods) <= set(METHODS)


def test_there_is_a_preset_for_each_set_of_the_table():
    sets = {"winogrande_s", "arc_challenge", "arc_easy", "winogrande_m", "openbookqa", "boolq"}
    assert {path.stem for path in CONFIGS} == sets


def test_the_authors_defaults_are_blobs_but_for_the_noise():
    assert BLoB(noise="token", schedule="bursts") == BLoB(**vars(AuthorsBLoB()))
    assert BLoB(kl_lr=0.01).schedule == AuthorsBLoB().schedule
    assert BLoB().noise == "row"


# Prompts


def test_texts_stand_where_the_letters_belong():
    assert AUTHORS_ARC.render(SKY, "letter") == (
        f"{HEAD}Question: Which is red?\nChoices:\nsky) A\nblood) B\ngrass) C\nAnswer:"
    )
    assert AUTHORS_OPENBOOK.render(SKY, "letter") == (
        f"{HEAD}Question: Which is red?\nChioces:\nsky) A\nblood) B\ngrass) C\nAnswer:"
    )
    assert CHOICES.render(SKY, "letter").endswith("\nA) sky\nB) blood\nC) grass\nAnswer:")
    assert AUTHORS_ARC.answers(SKY, "letter") == ("A", "B", "C")


def test_boolqs_labels_are_interchanged_and_nothing_else():
    row = Question("1", "is the sky blue", ("True", "False"), 0, "The sky looks blue.")
    assert AUTHORS_BOOLQ.answers(row, "letter") == ("False", "True")
    assert TRUE_FALSE.answers(row, "letter") == ("True", "False")
    assert AUTHORS_BOOLQ.render(row, "letter") == TRUE_FALSE.render(row, "letter")


def test_boolqs_question_stands_as_it_is_and_its_passage_is_cut_by_characters():
    record = {"question": "is the sky blue", "answer": True, "passage": "x" * 1023 + "yz"}
    ours, theirs = (TASKS[name].parse(record, "1") for name in ("boolq", "boolq_authors"))
    assert (ours.question, len(ours.context)) == ("is the sky blue?", 1025)
    assert (theirs.question, theirs.context) == ("is the sky blue", "x" * 1023 + "y")
    assert ours.answer == theirs.answer == 0


def test_the_interchanged_labels_reach_the_class_logits(byte_level):
    row = Question("1", "is the sky blue", ("True", "False"), 0, "The sky looks blue.")
    ours = LetterScorer(byte_level, Task("b", (row,), (row,), prompt=TRUE_FALSE))
    theirs = LetterScorer(byte_level, Task("b", (row,), (row,), prompt=AUTHORS_BOOLQ))
    assert theirs.tokens == ours.tokens[::-1]


# Noise by token


@pytest.fixture
def scorer(llama, byte_level, tiny_task):
    return make_scorer(llama(), byte_level, tiny_task, "letter")


@pytest.fixture
def model(llama):
    """Gaussian adapters with a large σ and a B that lets the noise through."""
    config = LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.5)
    adapted = get_peft_model(llama(), config)
    torch.manual_seed(3)
    bayesify(adapted, init_root_std=0.6)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return adapted.eval()


def last(model, batch):
    return model(**batch).logits[:, -1, :4]


@pytest.fixture
def noises(model):
    """The first layer's noise (S, T, r) by token and by row, and its variance (r,).

    All tokens are the same, and positions come after the first A, so that its inputs are equal.
    """
    name, layer = next(iter(Slots(model).of_kind(GaussianLinear).items()))
    calls = []
    handle = layer.register_forward_hook(lambda _, inputs, out: calls.append((inputs[0], out)))
    TokenNoise(model, last).logits({"input_ids": torch.full((1, 3), 7)}, Draws(DRAWS))
    handle.remove()
    with torch.no_grad():
        x = calls[0][0][0]
        mean = x @ layer.weight.T
        by_token = torch.cat([output for _, output in calls]) - mean
        posterior = Gaussian(model, last)
        held = [x @ posterior.draw(index)[name].T - mean for index in range(DRAWS)]
        return by_token, torch.stack(held), (x.square() @ layer.std.square().T)[0]


def test_the_marginal_variance_is_the_row_forms_and_the_closed_form(noises):
    by_token, by_row, variance = noises
    error = math.sqrt(2 / DRAWS)  # of the variance of DRAWS normal numbers, relative
    assert ((by_token[:, 0].square().mean(0) / variance - 1).abs() < 4.5 * error).all()
    assert ((by_row[:, 0].square().mean(0) / variance - 1).abs() < 4.5 * error).all()
    pooled = by_token[:, 0].square().mean(0) / by_row[:, 0].square().mean(0)
    assert abs(pooled.mean() - 1) < 4.5 * error * math.sqrt(2 / len(variance))


def test_two_tokens_noises_are_uncorrelated_and_one_in_the_row_form(noises):
    by_token, by_row, variance = noises
    correlation = (by_token[:, 0] * by_token[:, 1]).mean(0) / variance
    assert (correlation.abs() < 4.5 / math.sqrt(DRAWS)).all()
    torch.testing.assert_close(by_row[:, 0], by_row[:, 1])


def test_draws_are_seeded_and_the_first_ones_are_the_same(model):
    posterior = TokenNoise(model, last)
    batch = {"input_ids": torch.arange(12).view(2, 6) + 5}
    five = posterior.logits(batch, Draws(5))
    assert five.shape == (5, 2, 4)
    assert torch.equal(five[:3], posterior.logits(batch, Draws(3)))
    assert not torch.equal(five[0], five[1])
    assert not torch.equal(five, posterior.logits(batch, Draws(5, seed=1)))
    mean = Gaussian(model, last).logits(batch, Draws(0))
    assert torch.equal(posterior.logits(batch, Draws(0)), mean)


def test_only_the_noise_is_switched_on_and_all_is_given_back(model):
    batch = {"input_ids": torch.arange(6).view(1, 6) + 5}
    state = torch.get_rng_state()
    training = []

    def score(model, batch):
        training.extend(type(module).__name__ for module in model.modules() if module.training)
        return last(model, batch)

    posterior = TokenNoise(model.train(), score)
    posterior.logits(batch, Draws(2))
    assert set(training) == {"GaussianLinear"}
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert {layer.noise for layer in Slots(model).of_kind(GaussianLinear).values()} == {"row"}


def test_a_pass_that_fails_gives_the_noise_back(model):
    def score(model, batch):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        TokenNoise(model, score).logits({"input_ids": torch.ones(1, 2).long()}, Draws(1))
    layers = Slots(model).of_kind(GaussianLinear).values()
    assert {(layer.noise, layer.training) for layer in layers} == {("row", False)}


def test_the_method_trains_and_predicts_with_noise_by_token(llama, scorer, tiny_task):
    posterior = AuthorsBLoB().fit(llama(), scorer, Training(steps=4, progress=False))
    assert type(posterior) is TokenNoise
    assert {layer.noise for layer in Slots(posterior.model).of_kind(GaussianLinear).values()} == {
        "token"
    }
    assert posterior.state()[1]["noise"] == "token"
    assert not hasattr(posterior, "draw")
    batch = scorer.collate(scorer.encode(tiny_task.evaluation))
    batch.pop("labels")
    assert predict(posterior, batch, 3).probabilities.shape == (6, 4)


def test_refusals(llama, scorer, model):
    plain = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="the model has no Gaussian layer: got a deterministic"):
        TokenNoise(plain, last)
    method = PosteriorScale(base=AuthorsBLoB())
    with pytest.raises(ValueError, match="scales a Gaussian: got a TokenNoise from its base"):
        method.fit(llama(), scorer, Training(steps=2, progress=False))
    with pytest.raises(ValueError, match="TokenNoise draws are not adapters: got a mixture"):
        Mixture([TokenNoise(model, last)]).draw(0)
    facts = {"noise": "row", "init_root_std": 0.05}
    saved = Saved(plain, last, {"nowhere.root_std": torch.ones(2, 2)}, facts)
    with pytest.raises(ValueError, match="of another model or rank: got 1 tensors"):
        TokenNoise.restore(saved)
