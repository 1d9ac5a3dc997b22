"""Cheap posteriors: each arm's draws are what it says, a file that goes on, the table."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import linear
from torch.testing import assert_close

from bayestune.adapters import GaussianLinear, Lora, Slots, attach, drawn
from bayestune.forward import Draws
from bayestune.models import LoadedModel
from bayestune.whole_files import read_json_lines
from studies import cheap_posteriors as study
from studies.cheap_arms import Antithetic, Arm, TailScorer, block_of
from studies.cheap_table import fitted_average
from tests.tiny import randomised

DRAWS = Draws(3)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def posterior(llama, byte_level, tiny_task):
    """Makes an arm's posterior on a tiny model whose adapters reach the output, and a batch."""

    def make(kind, size=0):
        arm = Arm(kind, size)
        base = llama()
        scorer = arm.scorer(LoadedModel(base, byte_level, "tiny"), tiny_task)
        adapted = attach(base, Lora(4, 8, targets=("q_proj", "v_proj")))
        arm.prepare(adapted)
        for layer in Slots(adapted).of_kind(GaussianLinear).values():
            layer.set_root_std(torch.full_like(layer.weight, 0.6))
        batch = scorer.collate(scorer.encode(tiny_task.evaluation[:3]))
        batch.pop("labels")
        return arm, arm.posterior(randomised(adapted), scorer), batch

    return make


def test_noise_on_the_last_tokens_leaves_the_others_at_the_mean(posterior):
    _, one, _ = posterior("tokens", 2)
    layer = next(iter(one.layers().values())).train()
    x = torch.randn(3, 7, layer.in_features)
    mean = linear(x, layer.weight)
    noisy = layer(x)
    assert_close(noisy[:, :-2], mean[:, :-2])
    assert (noisy[:, -2:] - mean[:, -2:]).abs().min() > 0


def test_noise_in_the_last_blocks_is_in_no_other(posterior):
    _, one, _ = posterior("blocks", 1)
    assert {block_of(name) for name in one.layers()} == {1}


def test_an_adapter_at_the_end_reads_what_the_base_has_read(posterior):
    arm, one, batch = posterior("adapter", 3)
    found = one.logits(batch, DRAWS)
    model = one.model
    at_the_end = {}
    for name, layer in Slots(model).layers.items():
        at_the_end[name] = layer.register_forward_hook(_adapter_on_the_last(3))
    plain = super(TailScorer, one.scorer).__call__
    for index in range(3):
        stacks = {name: weight[None] for name, weight in one.draw(index).items()}
        with torch.no_grad(), drawn(model, stacks):
            assert_close(found[index], plain(model, batch), **CLOSE)
    assert not torch.allclose(found[0], found[1])
    with torch.no_grad():
        assert_close(one.logits(batch, arm.draws(0))[0], plain(model, batch), rtol=0.1, atol=0.1)


def _adapter_on_the_last(tokens):
    """A hook that takes a LoRA layer's part off all but the last tokens."""

    def hook(layer, args, output):
        base = layer.base_layer(*args)
        return torch.cat([base[:, :-tokens], output[:, -tokens:]], 1)

    return hook


def test_antithetic_draws_lie_on_both_sides_of_the_mean(posterior):
    _, one, _ = posterior("full")
    twins = Antithetic(one.model, one.scorer)
    name = next(iter(one.layers()))
    mean = one.layers()[name].weight.detach()
    assert_close((twins.draw(2)[name] + twins.draw(3)[name]) / 2, mean)
    assert_close(twins.draw(2)[name], one.draw(1)[name])
    assert not torch.allclose(twins.draw(0)[name], twins.draw(2)[name])


def test_a_fitted_gaussian_is_the_draws_law_when_there_are_many():
    torch.manual_seed(0)
    root = torch.randn(2, 3, 3, dtype=torch.float64)
    normal = torch.randn(20000, 2, 3, dtype=torch.float64)
    logits = torch.einsum("ncd,snd->snc", root, normal)
    average = logits.softmax(-1).mean(0)
    assert_close(fitted_average(logits, samples=20000), average, rtol=0, atol=0.01)
    shifted = logits + torch.randn(20000, 2, 1, dtype=torch.float64)  # which softmax does not see
    assert_close(fitted_average(shifted), fitted_average(logits), rtol=0, atol=1e-9)
    absent = torch.cat([logits, torch.full((20000, 2, 1), -torch.inf, dtype=torch.float64)], -1)
    padded = fitted_average(absent, samples=20000)
    assert padded[:, 3].tolist() == [0, 0]
    assert_close(padded[:, :3], average, rtol=0, atol=0.02)


def test_a_run_goes_on_and_gives_the_table(real, tmp_path, capsys):
    path = tmp_path / "records.jsonl"
    rows = ["--train_rows", "4", "--held_out_rows", "3", "--rows", "3", "--batch", "3"]
    few = [*rows, "--steps", "2", "--stds", "0.1", "--threads", "1", "--task", "arc_easy"]
    chosen = [*few, *real, "--json", str(path), "--arms", "full", "tokens 1", "adapter 1"]
    study.main(["run", *chosen, "--seeds", "1"])
    before = path.read_text(encoding="utf-8")
    study.main(["run", *chosen, "--seeds", "1", "2"])
    assert path.read_text(encoding="utf-8").startswith(before)
    records = read_json_lines(path)
    arms = ["mle", "full", "tokens 1", "adapter 1"]
    assert [(one["arm"], one["seed"]) for one in records] == [
        (arm, seed) for seed in (1, 2) for arm in arms
    ]
    study.main(["cost", *few, *real, "--json", str(path), "--turns", "1"])
    longer = [*few, *real, "--json", str(path), "--steps", "3", "--arms", "full", "--seeds", "1"]
    study.main(["run", *longer])
    capsys.readouterr()
    study.main(["table", "--json", str(path)])
    printed = capsys.readouterr().out
    assert printed.count("| tokens 1 | **0.1** |") == 2
    assert "| antithetic 3, fitted |" in printed
    first, second = printed.split("arc_easy, 3 steps at 0.001")
    assert "tokens 1" in first
    assert "tokens 1" not in second
    head, rule, *_ = (line for line in first.splitlines() if line.startswith("|"))
    assert head.count("|") == rule.count("|") == 9


def test_the_topics_are_the_embedded_questions():
    options = study.parser().parse_args(["run"])
    task = study.task_of(options)
    assert (len(task.train), len(task.held_out), len(task.evaluation)) == (96, 60, 120)
    ids = [row.id for row in (*task.train, *task.held_out, *task.evaluation)]
    assert len(set(ids)) == len(ids)
    assert task.train[0].options[task.train[0].answer].split()[0] in task.train[0].id


def test_draws_on_the_last_tokens_have_the_noise_that_training_has(posterior):
    arm, one, batch = posterior("tokens", 3)
    assert arm.draws(3) == replace(DRAWS, shared_prefix=3, bf16=True)
    found = one.logits(batch, replace(DRAWS, shared_prefix=3))
    layers = one.layers()
    for index in range(3):
        hooks = []
        for name, weight in one.draw(index).items():
            hooks.append(layers[name].register_forward_hook(_weight_on_the_last(3, weight)))
        with torch.no_grad():
            assert_close(found[index], one.scorer(one.model, batch), **CLOSE)
        for hook in hooks:
            hook.remove()


def _weight_on_the_last(tokens, weight):
    """A hook that gives the last tokens a weight (r, k) of their own."""

    def hook(layer, args, output):
        return torch.cat([output[:, :-tokens], linear(args[0][:, -tokens:], weight)], 1)

    return hook
