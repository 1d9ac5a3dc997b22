"""`gpu.py` at tiny sizes on the CPU: what its sections measure, and what they say."""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"
TINY = [
    "--device",
    "cpu",
    "--threads",
    "1",
    "--geometry",
    "tiny",
    "--length",
    "8",
    "--repeats",
    "2",
]


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.fixture
def lines(load, tmp_path):
    """Runs gpu.py; gives its records."""

    def run(*arguments):
        file = tmp_path / "gpu.jsonl"
        load("gpu").main([*TINY, "--json", str(file), *arguments])
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    return run


def cases_of(records, section):
    return [
        case
        for record in records
        if record["options"]["sections"] == [section]
        for case in record["cases"]
    ]


def test_every_section_is_measured_or_says_why_not(load, lines, capsys):
    records, printed = lines("--control"), capsys.readouterr().out
    done = [record["options"]["sections"][0] for record in records]
    left_out = [
        name for name in load("gpu_sections").SECTIONS if f"tiny {name} left out: " in printed
    ]
    assert sorted(done + left_out) == sorted(load("gpu_sections").SECTIONS)
    assert set(left_out) <= {"shared-1", "shared-4", "task-4"}  # what may not be there
    assert all(r["options"]["geometry"] == ["tiny"] and r["environment"]["torch"] for r in records)
    assert [case["bar"] for case in cases_of(records, "train-4")] == [1.02, None]
    assert {case["bar"] for case in cases_of(records, "task-4")} <= {None}
    for rows, bar in ((1, 4.0), (2, 4.0), (4, 4.0), (8, None)):
        cases = cases_of(records, f"draws-{rows}")
        assert [case["bar"] for case in cases] == [bar, None, None]
        assert cases[0]["name"] == f"10 exact draws / mean's pass, {rows}×8 tokens"
        assert list(cases[0]["amounts"]) == ["one pass", "mean"]


def test_memory_is_of_both_and_less_with_checkpointing(lines):
    plain, checkpointed = cases_of(lines("--sections", "memory", "--length", "64"), "memory")
    for case in (plain, checkpointed):
        assert case["bar"] == 1.01
        assert case["ratio"]["median"] == case["amounts"]["row"] / case["amounts"]["lora"] > 1
    assert checkpointed["amounts"]["lora"] < 0.9 * plain["amounts"]["lora"]
    assert checkpointed["name"] == f"{plain['name']}, gradient checkpointing"


def test_launches_are_counted_per_adapted_layer(lines):
    (case,) = cases_of(lines("--sections", "launches"), "launches")
    amounts = case["amounts"]
    assert amounts["adapted layers"] == 5  # two in each of two blocks, and the head
    assert amounts["more per adapted layer"] == (amounts["row"] - amounts["lora"]) / 5 > 0
    assert case["ratio"]["median"] == amounts["row"] / amounts["lora"]


def test_a_known_step_launches_what_it_launches(load):
    one, other = torch.ones(2), torch.ones(2)

    class Step:
        device = torch.device("cpu")

        def __call__(self, _):
            one.add_(other).mul_(other).neg_()

    sections = load("gpu_sections")
    assert sections.launches(Step()) == 3


class Watching:
    """Stands in for the pace: takes each action once and notes (rows, tokens) of each pass through a decoder layer."""

    warmup = 1

    def __init__(self):
        self.passes, self.actions = {}, {}

    def interleave(self, actions):
        self.actions, forward, seen = actions, LlamaMLP.forward, []

        def watched(layer, hidden):
            seen.append(tuple(hidden.shape[:2]))
            return forward(layer, hidden)

        LlamaMLP.forward = watched
        try:
            for name, action in actions.items():
                seen.clear()
                action(0)
                self.passes[name] = list(seen)
        finally:
            LlamaMLP.forward = forward
        return {name: [1.0] for name in actions}


@pytest.fixture
def subject(load):
    options = load("gpu").options_of(TINY)
    torch.manual_seed(0)
    return load("gpu_subject").Subject("tiny", options, torch.device("cpu"))


def passes_of(load, section, subject, **options):
    watching = Watching()
    getattr(load("gpu_sections"), section)(subject, watching, **options)
    return watching.passes


LAYERS = 2


def test_draws_are_the_passes_that_their_names_say(load, subject):
    passes = passes_of(load, "exact_draws", subject, rows=2)
    assert passes["one pass"] == [(20, 8)] * LAYERS
    assert passes["separate passes"] == [(2, 8)] * LAYERS * 10
    assert passes["mean"] == [(2, 8)] * LAYERS


def test_shared_draws_run_the_last_tokens_alone(load, subject):
    passes = passes_of(load, "shared_draws", subject, rows=2, lasts=(1, 3))
    assert passes["m=1"] == [(2, 7)] * LAYERS + [(20, 1)] * LAYERS
    assert passes["m=3"] == [(2, 5)] * LAYERS + [(20, 3)] * LAYERS
    assert passes["one pass"] == [(20, 8)] * LAYERS
    assert passes["mean"] == [(2, 8)] * LAYERS


def test_checkpointing_runs_each_layer_again_and_is_off_afterwards(load, subject):
    passes = passes_of(load, "train", subject, rows=3, checkpointing=True)
    assert passes == {"row": [(3, 8)] * LAYERS * 2, "lora": [(3, 8)] * LAYERS * 2}
    passes = passes_of(load, "train", subject, rows=3)
    assert passes == {"row": [(3, 8)] * LAYERS, "lora": [(3, 8)] * LAYERS}


def test_the_published_form_has_all_logits_and_noise_of_its_own(load, subject):
    watching, positions = Watching(), {}
    for _ in range(2):  # a second time with a model of its own, not with noise upon noise
        load("gpu_sections").task(subject, watching, rows=2)
    for name, step in watching.actions.items():

        def note(_, __, logits, name=name):
            positions[name] = logits.shape[1]

        step.model.get_base_model().lm_head.register_forward_hook(note)
        step(0)
    assert positions == {"row": 1, "lora": 1, "lora, published form": 8}
    layers = (
        load("bayestune.lora")
        .adapted_layers(watching.actions["lora, published form"].model)
        .values()
    )
    assert [(hasattr(layer, "root_std"), len(layer._forward_hooks)) for layer in layers] == [
        (True, 1)
    ] * 4 + [(True, 2)]  # the head is watched


def test_without_the_published_form_its_line_is_left_out(load, subject, monkeypatch):
    monkeypatch.setitem(sys.modules, "published", None)
    with pytest.raises(load("gpu_budget").UnfitError, match="the published form is not there"):
        load("gpu_sections").task(subject, Watching(), rows=2)


def test_models_share_the_base_in_bf16_and_only_blob_has_noise(load, subject):
    stock, ours = subject.model("lora"), subject.model("row")
    weights = [
        dict(m.named_parameters())["base_model.model.lm_head.base_layer.weight"]
        for m in (stock, ours)
    ]
    assert weights[0] is weights[1]
    assert weights[0].dtype == torch.bfloat16
    assert weights[0] is not ours.get_input_embeddings().weight
    assert [
        sum("root_std" in name for name, _ in model.named_parameters()) for model in (stock, ours)
    ] == [0, 5]
    assert not any("lora" in name for name, _ in subject.base.named_parameters())


def test_the_geometries_are_the_published_ones(load):
    shapes = {
        name: (
            sum(
                p.numel()
                for p in load("gpu_subject").random_model(name, torch.device("meta")).parameters()
            )
        )
        for name in ("llama2-7b", "llama31-8b")
    }
    assert shapes == {"llama2-7b": 6_738_415_616, "llama31-8b": 8_030_261_248}


def test_draws_that_disagree_or_are_all_alike_are_refused(load):
    check, draws = load("gpu_sections").check, torch.randn(10, 4, 4)
    check(draws, draws + 0.01)
    with pytest.raises(AssertionError, match="one pass and separate passes disagree: got a gap of"):
        check(draws, draws.flip(0))
    with pytest.raises(AssertionError, match="the draws are all alike"):
        check(draws[:1].expand(10, 4, 4), draws)


def test_a_profiler_without_launches_is_said(load, subject, monkeypatch):
    module = load("gpu_sections")
    monkeypatch.setattr(module, "launches", lambda _: 0)
    with pytest.raises(load("gpu_budget").UnfitError, match="the profiler recorded no launches"):
        module.launch_counts(subject, Watching(), rows=1)


def test_on_cuda_launches_are_the_runtime_s_calls(load, monkeypatch):
    names = [
        "aten::add",
        "cudaLaunchKernel",
        "cudaLaunchKernelExC",
        "cuLaunchKernel",
        "cudaMemcpyAsync",
        "void add<>()",
    ]
    events = [types.SimpleNamespace(name=name) for name in names]
    sections, asked, waited = load("gpu_sections"), [], []

    @contextlib.contextmanager
    def profile(activities):
        asked.extend(activities)
        yield types.SimpleNamespace(events=lambda: events)

    monkeypatch.setattr(sections, "profile", profile)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)

    class Step:
        device = torch.device("cuda")

        def __call__(self, turn):
            assert not waited

    assert sections.launches(Step()) == 3
    assert waited == [Step.device]
    assert torch.profiler.ProfilerActivity.CUDA in asked


def test_on_cuda_the_environment_names_the_gpu(load, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    properties = types.SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    where = load("gpu").surroundings(torch.device("cuda"))
    assert (where["device"], where["gpu_memory_gib"], where["cuda"]) == (
        "a GPU",
        80.0,
        torch.version.cuda,
    )


def test_no_cuda_is_said(load, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        load("gpu").main([])
    assert (
        "no CUDA device: got --device cuda, expected a machine with one; give --device cpu"
        in capsys.readouterr().err
    )


def test_it_runs_from_the_repository_with_torch_transformers_and_peft_alone(tmp_path):
    absent = "datasets", "matplotlib", "jsonargparse", "gguf", "ray", "scipy", "torchmetrics"
    program = "import runpy, sys; [sys.modules.__setitem__(name, None) for name in sys.argv.pop(1).split(',')]"
    program += f"; sys.argv.pop(0); sys.path.insert(0, {str(FOLDER)!r}); runpy.run_path(sys.argv[0], run_name='__main__')"
    arguments = [*TINY, "--sections", "train-1", "--json", str(tmp_path / "gpu.jsonl")]
    command = [sys.executable, "-c", program, ",".join(absent), str(FOLDER / "gpu.py"), *arguments]
    subprocess.run(
        command,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
    )
    assert json.loads((tmp_path / "gpu.jsonl").read_text())["cases"][0]["ratio"]["count"] == 2
