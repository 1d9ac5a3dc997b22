"""The benchmarks run at tiny sizes; their arithmetic is checked on a clock that is made up."""

import json
import math
import random

import pytest
import torch

import decision_time
import draws
import harness
import many_rows
import memory
import subjects
import task_step
import train_step
from tests.hub_files import write_arc, write_model

SIZES = "--layers 2 --hidden 32 --intermediate 64 --heads 4 --kv_heads 2 --vocab 128"
TINY = [*SIZES.split(), "--rows", "2", "--length", "8"]
QUICK = ["--threads", "1", "--repeats", "2", "--warmup", "1", "--allocator", "stock"]


@pytest.fixture
def run(tmp_path, capsys):
    """Runs a benchmark; returns its record after checking what it printed and wrote."""

    def run(benchmark, *arguments):
        file = tmp_path / "runs.jsonl"
        benchmark.main([*QUICK, "--json", str(file), *map(str, arguments)])
        (line,) = file.read_text(encoding="utf-8").splitlines()
        record = json.loads(line)
        printed = capsys.readouterr().out
        assert record["benchmark"] == benchmark.__name__
        assert str(tmp_path) not in line  # folders are kept by name
        assert record["environment"]["torch"]
        for case in record["cases"]:
            assert all(math.isfinite(value) and value > 0 for value in case["ratio"].values())
            assert all(math.isfinite(value) for value in case["amounts"].values())
            assert (
                harness.Case(**{**case, "ratio": harness.Spread(**case["ratio"])}).line() in printed
            )
        return record

    return run


@pytest.fixture
def real(llama, byte_level, tmp_path):
    """Options of a "real" model and task, which are tiny."""
    model = write_model(tmp_path / "model", llama(), byte_level)
    data = write_arc(tmp_path / "data")
    return "--model", model, "--data_root", data, "--rows", 4, "--precisions", "fp32"


def names_of(record):
    return [case["name"] for case in record["cases"]]


# The benchmarks


@pytest.mark.parametrize("logits", ["last", "full"])
def test_train_step(run, logits):
    kinds = ("row", "independent", "token")
    record = run(train_step, *TINY, "--logits", logits, "--noise", *kinds, "--control")
    lines = [(precision, kind) for precision in ("fp32", "bf16") for kind in (*kinds, "lora again")]
    assert names_of(record) == [f"{kind}, {precision}" for precision, kind in lines]


def test_train_step_over_bfloat16_weights_and_with_dropout(run, monkeypatch):
    models = []
    make = train_step.adapt_all

    def recorded(*arguments):
        models.append(make(*arguments))
        return models[-1]

    monkeypatch.setattr(train_step, "adapt_all", recorded)
    settings = ("--dtype", "bfloat16", "--lora_dropout", "0.25")
    record = run(train_step, *TINY, *settings, "--precisions", "bf16")
    assert names_of(record) == ["row, bf16"]
    assert record["title"].endswith(", bfloat16 weights, LoRA dropout 0.25")
    for model in models[0].values():
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        assert layer.base_layer.weight.dtype is torch.bfloat16
        assert layer.lora_A["default"].weight.dtype is torch.float32
        assert layer.lora_dropout["default"].p == 0.25


def test_memory(run):
    record = run(memory, *TINY, "--noise", "row", "token", "--precisions", "fp32")
    ratio = {case["name"]: case["ratio"]["median"] for case in record["cases"]}
    assert 1 < ratio["peak memory, row, fp32"] < ratio["allocated in the step, row, fp32"]
    assert ratio["peak memory, row, fp32"] == pytest.approx(1, abs=0.5)


def test_draws_with_what_rows_begin_with_kept_and_not(run, monkeypatch):
    passes = []
    make = draws.random_llama

    def recorded(options):
        model = make(options)
        blocks = model.model.layers
        blocks[0].register_forward_pre_hook(lambda _, args: passes.append(args[0].shape[:2]))
        return model

    monkeypatch.setattr(draws, "random_llama", recorded)
    sizes = ("--length", 40, "--common", 30, "--rows", 4, "--precisions", "fp32")
    record = run(draws, *TINY, "--synthetic", "--draws", 8, *sizes)
    kept = "what rows begin with kept / read by each row"
    assert names_of(record) == [
        "8 draws in one pass / in 8 passes, fp32",
        "8 draws in one pass / mean's pass, fp32",
        "8 draws in 8 passes / mean's pass, fp32",
        f"8 draws, {kept}, fp32",
        f"mean, {kept}, fp32",
        "8 draws / mean's pass, it kept in both, fp32",
    ]
    turns = passes[-2 * (8 + 4) :]  # of the two turns that count
    assert turns.count((4, 10)) == 2  # the mean, the common 30 tokens kept
    assert turns.count((4, 40)) == 2 * (8 + 1)  # eight single draws and the mean
    assert turns.count((32, 10)) == turns.count((32, 40)) == 2


def test_draws_of_real_prompts(run, real):
    assert len(run(draws, *real, "--draws", 2)["cases"]) == 6


def test_draws_need_a_subject(capsys):
    with pytest.raises(SystemExit):
        draws.main([])
    assert "give --model (and --data_root), or --synthetic" in capsys.readouterr().err


def test_draws_that_disagree_or_are_all_alike_are_refused():
    logits = torch.randn(10, 4, 4)
    assert draws.check(logits, logits + 0.001, "fp32") == pytest.approx(0.001, rel=0.01)
    draws.check(logits, logits + 0.1, "bf16")
    with pytest.raises(AssertionError, match="two ways to the same logits disagree: got a gap of"):
        draws.check(logits, logits + 0.1, "fp32")
    with pytest.raises(AssertionError, match="two ways to the same logits disagree"):
        draws.check(logits, logits.flip(0), "bf16")
    with pytest.raises(AssertionError, match="the draws are all alike"):
        draws.check(logits[:1].expand(10, 4, 4), logits, "bf16")


def test_decision_time(run, real):
    record = run(decision_time, *real, "--draws", 3, "--near", 1)
    assert [case["name"].rpartition(",")[0] for case in record["cases"]] == [
        "batch 1: student / mean",
        "batch 1: 3 draws / mean",
        "batch 4: student / mean",
        "batch 4: 3 draws / mean",
        "batch 4: student, then 3 draws of 1 rows / mean",
    ]
    assert {case["unit"] for case in record["cases"]} == {"ms a decision"}


def test_task_step(run, real):
    lines = ("full logits", "last logits")
    names = [f"BLoB task step / stock LoRA, {line}, fp32" for line in lines]
    assert names_of(run(task_step, *real)) == names


def test_a_stock_trainers_loss_counts_the_answer_alone(llama, byte_level, tiny_task):
    scorer = subjects.LetterScorer(byte_level, tiny_task)
    batch = scorer.collate(scorer.encode(tiny_task.train[:4]))
    model = llama()
    loss = task_step.full_loss(subjects.Prompts(model, scorer, [batch]))(model, 0)
    inputs = {name: batch[name] for name in task_step.INPUTS}
    logits = model(**inputs).logits[:, -1].log_softmax(-1)
    expected = [logits[i, scorer.tokens[label]] for i, label in enumerate(batch["labels"])]
    torch.testing.assert_close(loss, -torch.stack(expected).mean())


def test_too_few_rows_for_a_batch(real):
    with pytest.raises(
        ValueError, match=r"got 9 train rows of arc_easy, expected 50 or more; lower"
    ):
        task_step.main([*map(str, real), "--rows", "50"])


# Timing


class Clock:
    """A clock that only moves when told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_turns_are_interleaved_in_changing_order_and_warm_up_is_dropped():
    clock = Clock()
    calls = []

    def action(name, seconds):
        def act(turn):
            calls.append((turn, name))
            clock.now += seconds * (100 if turn < 2 else 1)

        return act

    actions = {"a": action("a", 3.0), "b": action("b", 2.0)}
    seconds = harness.interleave(actions, repeats=4, warmup=2, clock=clock)
    assert seconds == {"a": [3.0] * 4, "b": [2.0] * 4}
    assert "".join(name for _, name in calls) == "abbabaababba"
    assert [turn for turn, _ in calls] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_no_action_keeps_its_place(count):
    names = [str(i) for i in range(count)]
    orders = [harness.order_of(names, turn) for turn in range(2 * count)]
    for name in names:
        assert sorted(order.index(name) for order in orders) == sorted([*range(count)] * 2)


def test_paired_ratios_survive_a_machine_that_slows_down():
    slowness = [1.0, 5.0, 1.0, 9.0, 2.0]
    seconds = {"ours": [1.1 * s for s in slowness], "base": slowness}
    case = harness.ratio_case("x", seconds, ("ours", "base"))
    assert case.ratio.median == pytest.approx(1.1)
    assert case.amounts == {"ours": pytest.approx(2.2), "base": 2.0}
    assert case.line().startswith("  1.100  [1.100, 1.100]")


def test_the_interval_is_the_sign_tests():
    spread = harness.Spread.of([float(i) for i in range(1, 21)])
    assert (spread.low, spread.median, spread.high) == (6.0, 10.5, 15.0)  # the table's, n = 20
    few = harness.Spread.of([5.0, 1.0, 4.0, 2.0, 3.0])
    assert (few.low, few.median, few.high, few.count) == (1.0, 3.0, 5.0, 5)


def test_the_interval_covers_the_median():
    generator = random.Random(0)
    covered = 0
    for _ in range(2000):
        spread = harness.Spread.of([generator.expovariate(1) for _ in range(25)])
        covered += spread.low <= math.log(2) <= spread.high
    assert 0.945 < covered / 2000 < 0.975  # 0.957 by the binomial law


def test_collection_is_switched_on_again():
    def fail(_):
        assert not harness.gc.isenabled()
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        harness.interleave({"a": fail}, repeats=1)
    assert harness.gc.isenabled()


# Subjects


def test_a_twin_shares_weights_and_takes_adapters_of_its_own(llama):
    models = subjects.adapt_all(llama(), ["lora", "row"], 4)
    stock, ours = (dict(model.named_parameters()) for model in models.values())
    frozen = {name for name, parameter in stock.items() if not parameter.requires_grad}
    assert all(ours[name] is stock[name] for name in frozen)
    assert all(ours[name] is not stock[name] for name in set(stock) - frozen)
    assert {name.rpartition(".")[2] for name in set(ours) - set(stock)} == {"root_std"}


def test_the_peak_counts_every_byte_of_known_work():
    class Work:
        device = torch.device("cpu")

        def __call__(self, _):
            held = torch.empty(3 * 2**20, dtype=torch.uint8)
            torch.empty(5 * 2**20, dtype=torch.uint8)  # freed at once
            torch.empty(2**20, dtype=torch.uint8)
            del held

    assert memory.step_peak(Work()) == 8 * 2**20


@pytest.mark.slow
def test_many_rows_counts_what_predict_writes(run):
    record = run(many_rows, "--count", 640, "--draws", 0)
    memory_case, rate = record["cases"]
    assert memory_case["unit"] == "MB"
    assert rate["amounts"]["last tenth"] > 1
