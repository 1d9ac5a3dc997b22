"""What is offered of BLoB's public code: its prompts, its noise by token at prediction, its settings; the benchmark."""

import importlib
import math
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model

from bayestune import cli
from bayestune.adapters import bayesify, gaussian_layers
from bayestune.data import TASKS, Question, Task
from bayestune.data.prompts import AUTHORS_ARC, AUTHORS_BOOLQ, AUTHORS_OPENBOOK, CHOICES, TRUE_FALSE
from bayestune.forward import Draws
from bayestune.kl import kl_divergence
from bayestune.methods import METHODS, AuthorsBLoB, BLoB, PosteriorScale
from bayestune.posteriors import Gaussian, Mixture, TokenNoise, predict
from bayestune.posteriors.posterior import Saved
from bayestune.scoring import LetterScorer, make_scorer
from bayestune.training import Training

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs/faithful").glob("*.yaml"))
HEAD = "Return the label of the correct answer for the question below.\n\n"
SKY = Question("sky", "Which is red?", ("sky", "blood", "grass"), 1)
DRAWS = 600


# Settings


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_faithful_preset_is_the_authors_run(path):
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    parser = cli.make_parser()
    options = parser.instantiate(
        parser.parse_args(["compare", "--config", str(path), "--output", "out"])
    ).compare
    expected = {
        "prior_std": 0.2,
        "init_root_std": 0.05,
        "noise": "token",
        "kl_lr": 0.01,
        "schedule": "bursts",
    }
    assert cli._method("blob", options) == BLoB(**expected, std_optimizer="sgd")
    assert cli._method("blob_authors", options) == AuthorsBLoB(**expected, std_optimizer="sgd")
    training = cli._built(Training, options, output=None)
    assert (training.steps, training.batch_size, training.learning_rate, training.warmup_ratio) == (
        5000,
        4,
        1e-4,
        0.06,
    )
    assert (training.lora.rank, training.lora.alpha, training.lora.dropout) == (8, 16, 0.0)
    assert training.lora.targets == ("q_proj", "v_proj", "lm_head")
    assert given["task"] == (
        path.stem if path.stem.startswith("winogrande") else f"{path.stem}_authors"
    )
    assert given["task"] in TASKS
    assert set(given["methods"]) <= set(METHODS)


def test_there_is_a_preset_for_each_set_of_the_table():
    sets = {"winogrande_s", "arc_challenge", "arc_easy", "winogrande_m", "openbookqa", "boolq"}
    assert {path.stem for path in CONFIGS} == sets


def test_the_authors_defaults_are_blobs_but_for_the_noise():
    ours, theirs = BLoB(), AuthorsBLoB()
    assert {name for name in vars(ours) if vars(ours)[name] != vars(theirs)[name]} == {"noise"}
    assert (ours.noise, theirs.noise) == ("row", "token")


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


def test_the_interchanged_labels_reach_the_class_logits(llama, byte_level):
    row = Question("1", "is the sky blue", ("True", "False"), 0, "The sky looks blue.")
    ours, theirs = (
        LetterScorer(byte_level, Task("b", (row,), (row,), prompt=p))
        for p in (TRUE_FALSE, AUTHORS_BOOLQ)
    )
    assert theirs.tokens == ours.tokens[::-1]


# Noise by token


@pytest.fixture
def scorer(llama, byte_level, tiny_task):
    return make_scorer(llama(), byte_level, tiny_task, "letter")


@pytest.fixture
def model(llama):
    """Gaussian adapters with a large σ and a B that lets the noise through."""
    adapted = get_peft_model(
        llama(), LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.5)
    )
    torch.manual_seed(3)
    bayesify(adapted, init_root_std=0.6)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return adapted.eval()


def last(model, batch):
    return model(**batch).logits[:, -1, :4]


@pytest.fixture
def seen(model):
    """What the first layer's A puts out in each pass, and what reaches it."""
    layer, calls = next(iter(gaussian_layers(model).values())), []
    layer.register_forward_hook(lambda _, inputs, output: calls.append((inputs[0], output)))
    return layer, calls


def noises(model, seen):
    """The first layer's noise (S, T, r) under both forms on a row whose tokens are all the same, and its variance."""
    layer, calls = seen
    batch = {
        "input_ids": torch.full((1, 3), 7)
    }  # positions come after the first A: its inputs are equal
    TokenNoise(model, last).logits(batch, Draws(DRAWS))
    x, outputs = calls[0][0][0], torch.cat([output for _, output in calls])
    mean = x @ layer.weight.T
    name = next(iter(gaussian_layers(model)))
    posterior = Gaussian(model, last)
    held = torch.stack([x @ posterior.draw(index)[name].T for index in range(DRAWS)])
    return (
        (outputs - mean).detach(),
        (held - mean).detach(),
        (x.square() @ layer.std.square().T)[0].detach(),
    )


def test_the_marginal_variance_is_the_row_forms_and_the_closed_form(model, seen):
    by_token, by_row, variance = noises(model, seen)
    error = math.sqrt(2 / DRAWS)  # of the variance of DRAWS normal numbers, relative
    assert ((by_token[:, 0].square().mean(0) / variance - 1).abs() < 4.5 * error).all()
    assert ((by_row[:, 0].square().mean(0) / variance - 1).abs() < 4.5 * error).all()
    pooled = by_token[:, 0].square().mean(0) / by_row[:, 0].square().mean(0)
    assert abs(pooled.mean() - 1) < 4.5 * error * math.sqrt(2 / len(variance))


def test_two_tokens_noises_are_uncorrelated_and_one_in_the_row_form(model, seen):
    by_token, by_row, variance = noises(model, seen)
    assert (
        (by_token[:, 0] * by_token[:, 1]).mean(0).abs() / variance < 4.5 / math.sqrt(DRAWS)
    ).all()
    torch.testing.assert_close(by_row[:, 0], by_row[:, 1])


def test_draws_are_seeded_and_the_first_ones_are_the_same(model):
    posterior, batch = TokenNoise(model, last), {"input_ids": torch.arange(12).view(2, 6) + 5}
    five = posterior.logits(batch, Draws(5))
    assert five.shape == (5, 2, 4)
    assert torch.equal(five[:3], posterior.logits(batch, Draws(3)))
    assert not torch.equal(five[0], five[1])
    assert not torch.equal(five, posterior.logits(batch, Draws(5, seed=1)))
    assert torch.equal(
        posterior.logits(batch, Draws(0)), Gaussian(model, last).logits(batch, Draws(0))
    )


def test_only_the_noise_is_switched_on_and_all_is_given_back(model):
    batch, state = {"input_ids": torch.arange(6).view(1, 6) + 5}, torch.get_rng_state()
    training = []

    def score(model, batch):
        training.extend(type(module).__name__ for module in model.modules() if module.training)
        return last(model, batch)

    posterior = TokenNoise(model.train(), score)
    posterior.logits(batch, Draws(2))
    assert set(training) == {"GaussianLinear"}
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert {layer.noise for layer in gaussian_layers(model).values()} == {"row"}


def test_a_pass_that_fails_gives_the_noise_back(model):
    def score(model, batch):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        TokenNoise(model, score).logits({"input_ids": torch.ones(1, 2).long()}, Draws(1))
    assert {(layer.noise, layer.training) for layer in gaussian_layers(model).values()} == {
        ("row", False)
    }


def test_the_method_trains_and_predicts_with_noise_by_token(llama, scorer, tiny_task):
    posterior = AuthorsBLoB().fit(llama(), scorer, Training(steps=4, progress=False))
    assert type(posterior) is TokenNoise
    assert {layer.noise for layer in gaussian_layers(posterior.model).values()} == {"token"}
    assert posterior.state()[1]["noise"] == "token"
    assert not hasattr(posterior, "draw")
    batch = scorer.collate(scorer.encode(tiny_task.evaluation))
    batch.pop("labels")
    assert predict(posterior, batch, 3).probabilities.shape == (6, 4)


def test_refusals(llama, scorer, model):
    plain = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(
        ValueError,
        match="the model has no Gaussian layer: got a deterministic model; call bayesify",
    ):
        TokenNoise(plain, last)
    with pytest.raises(
        ValueError, match="PosteriorScale scales a Gaussian: got a TokenNoise from its base"
    ):
        PosteriorScale(base=AuthorsBLoB()).fit(llama(), scorer, Training(steps=2, progress=False))
    with pytest.raises(
        ValueError, match="draws of TokenNoise are no adapters: got no `draw`; use `logits`"
    ):
        Mixture([TokenNoise(model, last)]).draw(0)
    with pytest.raises(ValueError, match="of another model or rank: got 1 tensors"):
        TokenNoise.restore(
            Saved(
                plain,
                last,
                {"nowhere.root_std": torch.ones(2, 2)},
                {"noise": "row", "init_root_std": 0.05},
            )
        )


# The benchmark


@pytest.fixture
def fidelity(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("fidelity")


def test_the_kl_with_epsilon_is_the_kl_but_for_it(fidelity):
    mean, std = torch.randn(4, 6) * 0.1, torch.rand(4, 6) * 0.1 + 0.05
    theirs, ours = (
        fidelity.kl_with_epsilon(mean, std),
        kl_divergence(mean.double(), std.double(), 0.2),
    )
    assert 0 < abs(theirs / ours - 1) < 1e-4


def test_the_published_settings_end_where_they_are_said_to(fidelity):
    ends = [
        fidelity.std_of_run(rows, epsilon)
        for rows in fidelity.ROWS.values()
        for epsilon in (0.0, 1e-6)
    ]
    assert ends[::2] == pytest.approx([0.187, 0.174, 0.152, 0.148, 0.122, 0.098], abs=6e-4)
    assert ends[1::2] == pytest.approx(ends[::2], rel=1e-4)


def test_logits_are_averaged_before_or_after_the_softmax(fidelity):
    both = fidelity.averaged(torch.tensor([[[4.0, 0.0]], [[0.0, 0.0]]]))
    sure = 1 / (1 + math.exp(-4.0))
    assert both["probabilities"][0, 0] == pytest.approx((sure + 0.5) / 2)
    assert both["logits"][0, 0] == pytest.approx(1 / (1 + math.exp(-2.0)))


@pytest.mark.parametrize(
    "section", ["noise-correlation", "kl-two-steps", "drop-last", "logit-averaging"]
)
def test_a_section_prints_its_figures(fidelity, section, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(fidelity, "PASSES", 200)
    monkeypatch.setattr(fidelity, "CHOICES", 20)
    fidelity.main([section, "--cache", str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.startswith(f"{section}: ")
    assert "nan" not in printed


def test_an_unknown_section_is_refused(fidelity, capsys):
    with pytest.raises(SystemExit):
        fidelity.main(["everything"])
    assert (
        "unknown sections: got ['everything'], expected some of ['noise-correlation'"
        in capsys.readouterr().err
    )


def test_the_fits_are_kept_and_compared(fidelity, llama, byte_level, tmp_path, capsys):
    llama().save_pretrained(tmp_path / "model")
    byte_level.save_pretrained(tmp_path / "model")
    options = [
        "--model",
        tmp_path / "model",
        "--cache",
        tmp_path / "cache",
        "--steps",
        8,
        "--rows",
        6,
        "--draws",
        2,
    ]
    fidelity.main(["token-noise", *map(str, options), "--fits", "row-constant", "token-bursts"])
    first = capsys.readouterr().out
    assert "8 steps in" in first
    assert "nll, token-bursts/token − row-constant/row: " in first
    assert sorted(file.stem for file in (tmp_path / "cache").iterdir()) == [
        "row-constant",
        "token-bursts",
    ]
    fidelity.main(["token-noise", *map(str, options), "--fits", "row-constant", "token-bursts"])
    assert first.endswith(again := capsys.readouterr().out)
    assert "steps in" not in again


def test_prompts_that_lose_their_end_are_counted(fidelity, llama, byte_level, tmp_path, capsys):
    llama().save_pretrained(tmp_path / "model")
    byte_level.save_pretrained(tmp_path / "model")
    line = '{"question": "is the sky %s", "answer": true, "passage": "%s"}\n'
    folder = tmp_path / "data/google/boolq/default"
    folder.mkdir(parents=True)
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text(
            line % ("blue", "x " * 600) + line % ("red", "x"), encoding="utf-8"
        )
    fidelity.main(
        ["truncation", "--model", str(tmp_path / "model"), "--data_root", str(tmp_path / "data")]
    )
    assert "evaluation: 1 of 2 prompts are longer than 300 tokens" in capsys.readouterr().out


def test_prompts_are_compared_on_the_same_questions(fidelity, llama, byte_level, tmp_path, capsys):
    llama().save_pretrained(tmp_path / "model")
    byte_level.save_pretrained(tmp_path / "model")
    line = '{"id": "%d", "question": "what is %d?", "choices": {"text": ["red", "sky"], "label": ["A", "B"]}, '
    rows = "".join(line % (i, i) + '"answerKey": "%s"}\n' % "AB"[i % 2] for i in range(6))  # noqa: UP031
    folder = tmp_path / "data/allenai/ai2_arc/ARC-Easy"
    folder.mkdir(parents=True)
    for split in ("train", "validation"):
        (folder / f"{split}.jsonl").write_text(rows, encoding="utf-8")
    where = ["--model", tmp_path / "model", "--data_root", tmp_path / "data", "--rows", 4]
    fidelity.main(["prompts", *map(str, where)])
    printed = capsys.readouterr().out
    assert "prompts: arc_easy, n 4" in printed
    assert "prompts: arc_easy_authors, n 4" in printed
    assert "  nll of theirs − of the paper's " in printed
