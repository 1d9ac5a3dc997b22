"""The benchmarks run at tiny sizes and report ratios; their arithmetic is checked on a clock that is made up."""

import importlib
import json
import math
import random
from pathlib import Path

import pytest
import torch

from bayestune.runtime import keep_freed_memory
from checkout import write_checkout

FOLDER = Path(__file__).parents[1] / "benchmarks"
SIZES = {
    "layers": 2,
    "hidden": 32,
    "intermediate": 64,
    "heads": 4,
    "kv_heads": 2,
    "vocab": 128,
    "rows": 2,
    "length": 8,
}
TINY = [part for name, size in SIZES.items() for part in (f"--{name}", size)]
QUICK = ["--threads", "1", "--repeats", "2", "--warmup", "1", "--allocator", "stock"]


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.fixture
def run(load, tmp_path, capsys):
    """Runs a benchmark's main; gives its record after checking what it printed and wrote."""

    def run(name, *arguments):
        file = tmp_path / "runs.jsonl"
        load(name).main([*QUICK, "--json", str(file), *map(str, arguments)])
        (line,) = file.read_text(encoding="utf-8").splitlines()
        record, printed = json.loads(line), capsys.readouterr().out
        assert record["benchmark"] == name
        assert str(tmp_path) not in json.dumps(record)  # folders are kept by name
        assert record["environment"]["torch"]
        assert record["cases"]
        for case in record["cases"]:
            assert all(math.isfinite(value) and value > 0 for value in case["ratio"].values())
            assert all(math.isfinite(value) for value in case["amounts"].values())
            assert f"{case['ratio']['median']:.3f}  [" in printed
            assert case["name"] in printed
        return record

    return run


@pytest.fixture
def real(llama, byte_level, tmp_path):
    """Options of a "real" model and task: a tiny Llama saved with a tokenizer, and rows in the Hub's layout."""
    llama().save_pretrained(tmp_path / "model")
    byte_level.save_pretrained(tmp_path / "model")
    folder = tmp_path / "data" / "allenai" / "ai2_arc" / "ARC-Easy"
    folder.mkdir(parents=True)
    choices = {"text": ["red", "green", "blue", "sky"], "label": list("ABCD")}
    for split in ("train", "validation"):
        rows = [
            {
                "id": f"{i}",
                "question": f"what is {i}?",
                "choices": choices,
                "answerKey": "ABCD"[i % 4],
            }
            for i in range(9)
        ]
        (folder / f"{split}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
    return (
        "--model",
        tmp_path / "model",
        "--data_root",
        tmp_path / "data",
        "--rows",
        4,
        "--precisions",
        "fp32",
    )


def names_of(record):
    return [case["name"] for case in record["cases"]]


@pytest.mark.parametrize("logits", ["last", "full"])
def test_train_step(run, logits):
    record = run(
        "train_step",
        *TINY,
        "--logits",
        logits,
        "--noise",
        "row",
        "independent",
        "token",
        "--control",
    )
    kinds = ("row", "independent", "token", "lora again")
    assert names_of(record) == [
        f"{kind}, {precision}" for precision in ("fp32", "bf16") for kind in kinds
    ]
    assert [case["bar"] for case in record["cases"]] == [1.02, None, None, None] * 2


def test_memory(run):
    record = run("memory", *TINY, "--noise", "row", "token", "--precisions", "fp32")
    ratio = {case["name"]: case["ratio"]["median"] for case in record["cases"]}
    assert 1 < ratio["peak memory, row, fp32"] < ratio["allocated in the step, row, fp32"]
    assert ratio["peak memory, row, fp32"] == pytest.approx(1, abs=0.5)


def test_attention(run):
    sizes = [part for part in TINY if part not in ("--length", SIZES["length"])]
    record = run("attention", *sizes, "--lengths", 8, 16, "--precisions", "fp32")
    assert names_of(record) == ["2×8 tokens, fp32", "2×16 tokens, fp32"]


def test_layer(run):
    record = run("layer", "--hidden", 32, "--length", 8, "--precisions", "fp32")
    assert names_of(record) == ["ours / stock Linear, fp32", "ours / autograd, fp32"]


def test_allocator(run, real):
    if not keep_freed_memory():
        pytest.skip("another C library")
    record = run("allocator", *real, "--draws", 2)
    assert names_of(record) == ["task step, fp32", "2 draws, fp32"]
    keep_freed_memory(False)


def test_draws_without_files(run):
    record = run("draws", *TINY, "--synthetic", "--draws", 3)
    assert [case["bar"] for case in record["cases"]] == [1.0, 5.0, None, None, None, 5.0] * 2
    assert names_of(record)[0] == "3 draws in one pass / in 3 passes, fp32"


def test_draws_with_what_rows_begin_with_kept_and_not(run, load, monkeypatch):
    module, passes = load("draws"), []
    monkeypatch.setattr(module, "random_llama", recorded(module.random_llama, passes))
    sizes = ("--length", 40, "--common", 30, "--rows", 4, "--precisions", "fp32")
    record = run("draws", *TINY, "--synthetic", "--draws", 8, *sizes)
    kept, read = "what rows begin with kept", "read by each row"
    assert names_of(record)[3:5] == [
        f"{what}, {kept} / {read}, fp32" for what in ("8 draws", "mean")
    ]
    turns = passes[-2 * (8 + 4) :]  # of the two turns that count
    assert sorted(set(turns)) == [(4, 10), (4, 40), (32, 10), (32, 40)]
    assert [turns.count((rows, tokens)) for rows in (4, 32) for tokens in (10, 40)] == [
        2,
        2 * (8 + 1),
        2,
        2,
    ]


def recorded(make, passes):
    """Has the model that is made say the (rows, tokens) of each pass through its blocks."""

    def made(options):
        model = make(options)
        model.model.layers[0].register_forward_pre_hook(
            lambda _, args: passes.append(tuple(args[0].shape[:2]))
        )
        return model

    return made


def test_draws_of_real_prompts(run, real):
    assert len(run("draws", *real, "--draws", 2)["cases"]) == 6


def test_draws_need_a_subject(load, capsys):
    with pytest.raises(SystemExit):
        load("draws").main([])
    assert "--synthetic" in capsys.readouterr().err


def test_task_step(run, real):
    record = run("task_step", *real, "--epoch_rows", 8, "--epochs", 2)
    lines = [
        ("published form, ours with the attention it trains with", 0.60),
        ("published form", 0.60),
        ("stock LoRA, full logits", None),
        ("stock LoRA, last logits", None),
    ]
    found = [(case["name"], case["bar"]) for case in record["cases"]]
    assert found[:4] == [(f"BLoB task step / {line}, fp32", bar) for line, bar in lines]
    row = "a row of an epoch of 8, fp32"
    assert found[4:] == [
        (f"BLoB, batches by length / published form, random order, {row}", 0.60),
        (f"BLoB, batches by length / in random order, {row}", None),
        (f"tokens, batches by length / in random order, {row}", None),
    ]
    *_, seconds, tokens = record["cases"]
    assert (seconds["unit"], tokens["unit"]) == ("s", "tokens")
    assert seconds["ratio"]["count"] == 2


def test_task_step_over_a_checkout_of_the_authors_code(run, real, tmp_path):
    real = (*real[:-1], "fp32", "bf16")
    record = run(
        "task_step", *real, "--epoch_rows", 0, "--official", write_checkout(tmp_path / "checkout")
    )
    bars = {case["name"].removeprefix("BLoB task step / "): case["bar"] for case in record["cases"]}
    assert list(bars)[1:3] == ["published form, fp32", "the authors' code, fp32"]
    assert len(bars) == 10
    assert bars["the authors' code, bf16"] is None


def test_text_step(run, real):
    record = run("text_step", *real)
    lines = ("BLoB training step", "mean's pass")
    assert names_of(record) == [f"{line}, packed / expanded, fp32" for line in lines]
    assert float(record["title"].rpartition("at most ")[2].split()[0]) < 1e-5


def test_too_few_rows_for_a_batch(load, real):
    with pytest.raises(ValueError, match="expected 50 or more"):
        load("task_step").main([*map(str, real), "--rows", "50"])


def test_import_time(run, load, monkeypatch):
    module = load("import_time")
    monkeypatch.setattr(
        module, "BASES", {module.PLAIN: "import bisect", module.AFTER_TRAINER: "import bisect, csv"}
    )
    monkeypatch.setattr(module, "NAMES", "bayestune.__version__")
    record = run("import_time")
    assert len(record["cases"]) == 4
    assert all(case["ratio"]["median"] > 1 for case in record["cases"])


class Clock:
    """A clock that only moves when told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_turns_are_interleaved_in_changing_order_and_warm_up_is_dropped(load):
    harness, clock, calls = load("harness"), Clock(), []

    def action(name, seconds):
        def act(turn):
            calls.append((turn, name))
            clock.now += seconds * (100 if turn < 2 else 1)

        return act

    seconds = harness.interleave(
        {"a": action("a", 3.0), "b": action("b", 2.0)}, repeats=4, warmup=2, clock=clock
    )
    assert seconds == {"a": [3.0] * 4, "b": [2.0] * 4}
    assert [name for _, name in calls] == list("abbabaababba")
    assert [turn for turn, _ in calls] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_no_action_keeps_its_place(load, count):
    names = [str(i) for i in range(count)]
    orders = [load("harness").order_of(names, turn) for turn in range(2 * count)]
    for name in names:
        assert sorted(order.index(name) for order in orders) == sorted([*range(count)] * 2)


def test_paired_ratios_survive_a_machine_that_slows_down(load):
    harness = load("harness")
    slowness = [1.0, 5.0, 1.0, 9.0, 2.0]
    seconds = {"ours": [1.1 * s for s in slowness], "base": slowness}
    case = harness.timed_case("x", seconds, ("ours", "base"), bar=1.03)
    assert case.ratio.median == pytest.approx(1.1)
    assert case.amounts == {"ours": pytest.approx(2.2), "base": 2.0}
    assert case.line().startswith("  1.100  [1.100, 1.100]")


def test_spread_of_known_values(load):
    spread = load("harness").Spread.of([5.0, 1.0, 4.0, 2.0, 3.0])
    assert (spread.median, spread.lower_quartile, spread.upper_quartile) == (3.0, 2.0, 4.0)
    assert (spread.low, spread.high, spread.count) == (1.0, 5.0, 5)
    assert load("harness").Spread.of([7.0]).upper_quartile == 7.0


def test_interval_is_the_sign_tests(load):
    spread = load("harness").Spread.of([float(i) for i in range(1, 21)])
    assert (spread.low, spread.high) == (6.0, 15.0)  # the table's ranks for n = 20


def test_interval_covers_the_median(load):
    generator, spread = random.Random(0), load("harness").Spread.of
    found = [spread([generator.expovariate(1) for _ in range(25)]) for _ in range(2000)]
    covered = sum(one.low <= math.log(2) <= one.high for one in found) / len(found)
    assert 0.945 < covered < 0.975  # 0.957 by the binomial law


def test_collection_is_switched_on_again(load):
    harness = load("harness")

    def fail(_):
        assert not harness.gc.isenabled()
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        harness.interleave({"a": fail}, repeats=1)
    assert harness.gc.isenabled()


def test_twin_shares_weights_and_takes_adapters_of_its_own(load, llama):
    subjects, base = load("subjects"), llama()
    models = subjects.adapt_all(base, ["lora", "row"], 4)
    frozen = [
        {n: p for n, p in model.named_parameters() if not p.requires_grad}
        for model in models.values()
    ]
    assert all(frozen[1][name] is parameter for name, parameter in frozen[0].items())
    trained = [
        {n for n, p in model.named_parameters() if p.requires_grad} for model in models.values()
    ]
    assert {name for name in trained[1] if "root_std" not in name} == trained[0]
    assert any("root_std" in name for name in trained[1])


def test_peak_counts_every_byte_of_known_work(load):
    memory = load("memory")

    class Work:
        device = torch.device("cpu")

        def __call__(self, _):
            held = torch.empty(3 * 2**20, dtype=torch.uint8)
            torch.empty(5 * 2**20, dtype=torch.uint8)  # freed at once
            torch.empty(2**20, dtype=torch.uint8)
            del held

    assert memory.step_peak(Work()) == 8 * 2**20
