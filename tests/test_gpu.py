"""`gpu.py` at tiny sizes on the CPU: what its sections measure, and how it keeps to its time."""

import contextlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

import gpu
import harness

ROOT = Path(__file__).parents[1]
TINY = ["--device", "cpu", "--threads", "1", "--geometry", "tiny", "--length", "8"]
TINY += ["--repeats", "2"]
LAYERS = 2


def run(file, *arguments):
    """Runs gpu.py; returns its cases by section."""
    gpu.main([*TINY, "--json", str(file), *arguments])
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert all(record["options"]["geometry"] == ["tiny"] for record in records)
    return {record["options"]["sections"][0]: record["cases"] for record in records}


@pytest.mark.slow
def test_every_section_is_measured_or_says_why_not(tmp_path, capsys):
    cases = run(tmp_path / "gpu.jsonl")
    assert list(cases) == [name for name in gpu.SECTIONS if name != "flash-4"]
    assert "tiny flash-4 left out: the package flash-attn is not" in capsys.readouterr().out
    first, *_ = cases["draws-8"]
    assert first["name"] == "10 exact draws / mean's pass, 8×8 tokens"
    assert list(first["amounts"]) == ["one pass", "mean"]
    (peak,) = cases["memory"]
    assert peak["ratio"]["median"] == peak["amounts"]["row"] / peak["amounts"]["lora"] > 1
    (launches,) = cases["launches"]
    amounts = launches["amounts"]
    assert amounts["adapted layers"] == 5  # two in each of two blocks, and the head
    assert amounts["more per adapted layer"] == (amounts["row"] - amounts["lora"]) / 5 > 0


# What the sections do


class Watching:
    """Stands in for the pace: takes each action once and notes (rows, tokens) of each block."""

    warmup = 1

    def __init__(self):
        self.passes = {}

    def interleave(self, actions):
        forward = LlamaMLP.forward
        seen = []

        def watched(layer, hidden):
            seen.append(tuple(hidden.shape[:2]))
            return forward(layer, hidden)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LlamaMLP, "forward", watched)
            for name, action in actions.items():
                seen.clear()
                action(0)
                self.passes[name] = list(seen)
        return {name: [1.0] for name in actions}


@pytest.fixture
def subject():
    torch.manual_seed(0)
    return gpu.Subject("tiny", gpu.parser().parse_args(TINY), torch.device("cpu"))


def passes_of(section, subject, **options):
    watching = Watching()
    section(subject, watching, **options)
    return watching.passes


def test_draws_are_the_passes_that_their_names_say(subject):
    passes = passes_of(gpu.exact_draws, subject, rows=2)
    assert passes["one pass"] == [(20, 8)] * LAYERS
    assert passes["separate passes"] == [(2, 8)] * LAYERS * 10
    assert passes["mean"] == [(2, 8)] * LAYERS


def test_training_steps_are_one_pass_each(subject):
    passes = passes_of(gpu.train, subject, rows=3)
    assert passes == {"row": [(3, 8)] * LAYERS, "lora": [(3, 8)] * LAYERS}


def test_padding_is_in_front_and_the_attention_function_is_given_back(subject):
    mask = gpu.left_padded(torch.ones(3, 8).long())["attention_mask"]
    assert mask.tolist() == [[1] * 8, [0] * 2 + [1] * 6, [0] * 4 + [1] * 4]
    with gpu.attention([subject.model("row")], "eager"):
        assert subject.model("row").config._attn_implementation == "eager"
    passes_of(gpu.padding, subject, rows=2)
    assert subject.model("row").config._attn_implementation == "sdpa"


def test_flash_attention_is_used_where_it_is_installed(subject, monkeypatch):
    asked = []
    set_attention = type(subject.base).set_attn_implementation

    def noting(model, name):
        asked.append(name)
        set_attention(model, "eager" if name == gpu.FLASH else name)

    monkeypatch.setattr(gpu, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(type(subject.base), "set_attn_implementation", noting)
    first, _ = gpu.padding(subject, Watching(), 2, gpu.FLASH)
    assert first.name.endswith("padded rows, flash_attention_2, 2×8 tokens")
    assert asked == [gpu.FLASH] * 3 + ["sdpa"] * 3  # the posterior's, BLoB's and stock LoRA's


def test_models_share_the_base_in_bf16_and_only_blob_has_noise(subject):
    stock, ours = (dict(subject.model(name).named_parameters()) for name in ("lora", "row"))
    head = "base_model.model.lm_head.base_layer.weight"
    assert stock[head] is ours[head]
    assert stock[head].dtype == torch.bfloat16
    assert stock[head] is not subject.base.get_input_embeddings().weight
    assert sum("root_std" in name for name in ours) == 5
    assert not any("root_std" in name for name in stock)
    assert not any("lora" in name for name, _ in subject.base.named_parameters())


def test_the_geometries_are_the_published_ones():
    sizes = {"llama2-7b": 6_738_415_616, "llama31-8b": 8_030_261_248}
    for name, size in sizes.items():
        model = gpu.random_model(name, torch.device("meta"))
        assert sum(parameter.numel() for parameter in model.parameters()) == size


# On CUDA


def test_launches_are_the_runtime_s_calls(monkeypatch):
    names = ["aten::add", "cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "void add<>"]
    events = [types.SimpleNamespace(name=name) for name in names]
    waited = []

    @contextlib.contextmanager
    def profile(activities):
        assert torch.profiler.ProfilerActivity.CUDA in activities
        yield types.SimpleNamespace(events=lambda: events)

    class Step:
        device = torch.device("cuda")

        def __call__(self, turn):
            assert not waited

    monkeypatch.setattr(gpu, "profile", profile)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    assert gpu.launches(Step()) == 3
    assert waited == [Step.device]


def test_no_cuda_is_said(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    said = capsys.readouterr().err
    assert "no CUDA device: got --device cuda, expected a machine with one; give --device" in said


@pytest.mark.slow
def test_it_runs_from_the_repository_with_torch_transformers_and_peft_alone(tmp_path):
    absent = ["datasets", "matplotlib", "jsonargparse", "gguf", "ray", "scipy", "torchmetrics"]
    program = "import runpy, sys; sys.modules.update(dict.fromkeys({!r})); sys.argv.pop(0); "
    program += "sys.path.insert(0, {!r}); runpy.run_path(sys.argv[0], run_name='__main__')"
    folder = ROOT / "benchmarks"
    file = tmp_path / "gpu.jsonl"
    command = [sys.executable, "-c", program.format(absent, str(folder)), str(folder / "gpu.py")]
    command += [*TINY, "--sections", "train-1", "--json", str(file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    assert json.loads(file.read_text(encoding="utf-8"))["cases"][0]["ratio"]["count"] == 2


# Time


class Clock:
    """A clock that only moves when told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def lasting(self, seconds):
        def act(_):
            self.now += seconds

        return act


def pace_of(clock, deadline):
    return gpu.Pace(deadline, 400, 2, torch.device("cpu"), clock)


@pytest.mark.parametrize(("deadline", "turns"), [(60.0, 15), (33.0, 6), (10_000.0, 400)])
def test_as_many_turns_as_fit(deadline, turns):
    clock = Clock()
    actions = {"a": clock.lasting(2.0), "b": clock.lasting(1.0)}
    seconds = pace_of(clock, deadline).interleave(actions)
    assert seconds == {"a": [2.0] * turns, "b": [1.0] * turns}
    assert clock.now == 3.0 * (3 + 2 + turns) <= deadline  # three to probe, two to warm up


def test_too_few_turns_are_not_measured():
    clock = Clock()
    actions = {"a": clock.lasting(2.0), "b": clock.lasting(1.0)}
    with pytest.raises(gpu.UnfitError, match=r"a turn takes 3 s, and 23 s are left"):
        pace_of(clock, 32.0).interleave(actions)


def test_a_slow_first_turn_does_not_count_for_the_rate():
    clock = Clock()
    laps = iter([20.0])

    def act(_):
        clock.now += next(laps, 0.5)

    assert len(pace_of(clock, 31.0).interleave({"a": act})["a"]) == 18


@pytest.fixture
def planned(monkeypatch, tmp_path, capsys):
    """Runs gpu.py with made-up sections on a made-up clock."""

    def run(laps, seconds):
        clock = Clock()
        file = tmp_path / "gpu.jsonl"

        def section(lap, _, pace):
            if isinstance(lap, Exception):
                raise lap
            actions = {"ours": clock.lasting(1.1 * lap), "base": clock.lasting(lap)}
            return [harness.ratio_case("made up", pace.interleave(actions), ("ours", "base"))]

        made = {name: gpu.partial(section, lap) for name, lap in laps.items()}
        monkeypatch.setattr(gpu, "SECTIONS", made)
        arguments = [*TINY, "--repeats", "50", "--seconds", str(seconds), "--json", str(file)]
        failed = gpu.run(gpu.parser().parse_args(arguments), clock)
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        done = [json.loads(line)["options"]["sections"][0] for line in lines]
        return capsys.readouterr().out, done, failed, clock.now

    return run


@pytest.mark.slow
def test_a_section_that_does_not_fit_is_left_out_and_the_later_ones_have_its_time(planned):
    printed, done, failed, end = planned({"quick": 0.1, "slow": 30.0, "after": 0.2}, 300)
    assert (done, failed) == (["quick", "after"], [])
    assert "tiny slow left out: a turn takes 63 s, and 0 s are left" in printed
    assert end < 300


def test_when_the_time_is_up_the_rest_is_left_out(planned):
    printed, done, failed, _ = planned({"slow": 40.0, "late": 0.1}, 200)
    assert done == failed == []
    assert "tiny slow left out: a turn takes 84 s" in printed
    assert "tiny late left out: no time is left" in printed


@pytest.mark.slow
def test_a_failure_loses_its_own_section_only_and_shows_in_the_exit_code(planned, monkeypatch):
    laps = {"one": 0.1, "broken": RuntimeError("out of memory"), "two": 0.1}
    printed, done, failed, _ = planned(laps, 100)
    assert (done, failed) == (["one", "two"], ["tiny broken"])
    assert "tiny broken failed: RuntimeError: out of memory" in printed
    with pytest.raises(SystemExit, match="failed: tiny broken"):
        gpu.main([*TINY, "--seconds", "1000"])
