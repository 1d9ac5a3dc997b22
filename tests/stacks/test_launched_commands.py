"""`accelerate launch -m bayestune …` under DDP, FSDP2 and DeepSpeed against one process."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from bayestune.evaluation import read_records
from running import (
    environment,
    fitting,
    furnish,
    own_rows,
    predicted,
    probabilities,
    read_rows,
    run,
    write_rows,
)
from tiny import byte_level_tokenizer, tiny_llama

pytestmark = pytest.mark.stacks

SCRIPT = Path(__file__).parent / "launched_commands.py"
FSDP = (
    "--use_fsdp --fsdp_version=2 --fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP"
    " --fsdp_transformer_layer_cls_to_wrap=LlamaDecoderLayer"
)
STACKS = {
    "ddp": "--multi_gpu",
    "fsdp2": f"{FSDP} --fsdp_state_dict_type=FULL_STATE_DICT",
    "fsdp2-in-parts": f"{FSDP} --fsdp_state_dict_type=SHARDED_STATE_DICT",
    "zero2": "--use_deepspeed --zero_stage=2",
    "zero3": "--use_deepspeed --deepspeed_config_file={place}/zero3.json",
}
ZERO3 = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
}
TRAINING = {"steps": 6, "batch_size": 4, "logging_steps": 1, "learning_rate": 0.01}
FITS = {
    "mle": {"method": "mle", "accumulation": 2, "max_grad_norm": 0.5},
    "blob": {"method": "blob", "blob.final_std": 0.1, "save_steps": 3},
    "ensemble": {"method": "ensemble", "ensemble.size": 2},
    "laplace": {"method": "laplace"},
    "distilled": {"method": "distilled", "distilled.steps": 4},
}
IN_PARTS = ("mle", "blob")  # what can be fitted where the base is in parts afterwards


def fit(place, stack, name, *more):
    return [*fitting(place, "fit", f"{stack}/{name}", **TRAINING, **FITS[name]), *more]


def questions(place, stack):
    """Commands that ask the posterior which one process fitted, under every launcher."""
    many = f"--rows={place / 'many.jsonl'}"
    out = place / stack
    for name in ("blob", "calibrated"):
        folder = str(place / "alone" / name)
        draws = ["--draws=3"] if name == "blob" else []
        yield ["predict", folder, many, *draws, f"--output={out / f'predict-{name}.jsonl'}"]
        held_out = f"--evaluation_data={place / 'test.jsonl'}"
        how = ["--draws=[0,3]", "--prediction_batch=2", f"--output={out / f'evaluate-{name}'}"]
        yield ["evaluate", folder, held_out, *how]
    # under FSDP a base without its head's weights would be whole in the first process alone
    two = [str(place / "alone/head"), f"--rows={place / 'two.jsonl'}"]
    yield ["predict", *two, f"--output={out / 'predict-head.jsonl'}"]
    pool = f"--rows={place / 'pool.jsonl'}"
    yield ["rank", folder, pool, "--draws=3", f"--output={out / 'rank.jsonl'}"]


def further(place, stack):
    """Commands that fit several times, or on a posterior."""
    own = {"methods": "[mle,blob]", "evaluation_data": place / "test.jsonl", "draws": "[0,3]"}
    yield fitting(place, "compare", f"{stack}/compared", **TRAINING, **own)
    how = [f"--data={place / 'train.jsonl'}", "--steps=4", "--progress=false"]
    yield ["distil", str(place / "alone/blob"), *how, f"--output={place / stack / 'student'}"]


def launched(place, flags, commands):
    """Runs commands in two processes, in one without flags; their output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = f"-m accelerate.commands.launch --num_machines=1 --num_processes=2 {flags}"
    launch += f" --main_process_port={port} --num_cpu_threads_per_process=1"
    sharded = bool(flags) and flags != STACKS["ddp"]
    cpu = {} if sharded else {"ACCELERATE_USE_CPU": "true"}
    return subprocess.run(
        [
            sys.executable,
            *(launch.format(place=place).split() if flags else ()),
            SCRIPT,
            json.dumps({"sharded": sharded}),
            json.dumps(commands),
        ],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env=environment(DS_ACCELERATOR="cpu", **cpu),
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, rows, and what one process makes of them."""
    place = furnish(tmp_path_factory.mktemp("launch"), tiny_llama(), byte_level_tokenizer())
    (place / "zero3.json").write_text(json.dumps(ZERO3), encoding="utf-8")
    rows = own_rows(70, start=100)  # three windows of 32, of which one process has two
    write_rows(place / "pool.jsonl", rows)
    write_rows(place / "held_out.jsonl", rows[:60])
    write_rows(place / "many.jsonl", [*rows[:40], {"question": ""}, *rows[41:]])
    two = [{**row, "options": ["yes", "no"], "answer": n % 2} for n, row in enumerate(rows)]
    write_rows(place / "two.jsonl", two)
    head = {"data": place / "two.jsonl", "scoring": "head", "method": "mle"}
    fits = [fit(place, "alone", name) for name in FITS]
    fits.append(fitting(place, "fit", "alone/head", **TRAINING, **head))
    done = launched(place, "", fits)
    assert done.returncode == 0, done.stderr[-4000:]
    shutil.copytree(place / "alone/blob", place / "alone/calibrated")
    held_out = f"--rows={place / 'held_out.jsonl'}"
    run("calibrate", place / "alone/calibrated", held_out, "--risk=0.9", "--draws=[0,3]")
    commands = [*questions(place, "alone"), *further(place, "alone")]
    done = launched(place, "", commands)
    assert done.returncode == 0, done.stderr[-4000:]
    return place


def losses(folder):
    history = json.loads((folder / "training.json").read_text(encoding="utf-8"))["history"]
    return [line["loss"] for line in history if "loss" in line]


def names(folder):
    return {str(path.relative_to(folder)) for path in folder.glob("*")}


@pytest.mark.parametrize("stack", STACKS)
def test_two_processes_fit_and_answer_as_one(stack, place):
    chosen = FITS if stack in ("ddp", "zero2") else IN_PARTS
    commands = [fit(place, stack, name) for name in chosen]
    # and a fit that is killed, and resumed
    commands += [["cut", str(place / stack / "blob")], fit(place, stack, "blob", "--resume")]
    done = launched(place, STACKS[stack], [*commands, *questions(place, stack)])
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("posterior in") == len(chosen) + 1  # one process prints
    for name in chosen:
        ours = place / stack / name
        alone = place / "alone" / name
        assert names(ours) == names(alone)
        if name != "blob":  # resumed: the log begins anew
            assert_close(losses(ours), losses(alone), rtol=1e-4, atol=1e-5)
        for file in ("adapter_model.safetensors", "posterior.safetensors"):
            if (alone / file).exists() and name != "laplace":  # whose eigenvectors have a sign
                assert_close(load_file(ours / file), load_file(alone / file), rtol=1e-4, atol=2e-6)
        two = probabilities(predicted(place, "--draws=3", posterior=f"{stack}/{name}"))
        one = probabilities(predicted(place, "--draws=3", posterior=f"alone/{name}"))
        assert_close(two, one, rtol=1e-3, atol=1e-4)
    for file in (
        "predict-blob.jsonl",
        "predict-calibrated.jsonl",
        "predict-head.jsonl",
        "rank.jsonl",
    ):
        same(*(read_rows(place / folder / file) for folder in (stack, "alone")))
    answers = read_rows(place / stack / "predict-blob.jsonl")
    assert ["error" in line for line in answers] == [n == 40 for n in range(70)]
    for name in ("evaluate-blob", "evaluate-calibrated"):
        same_records(place, stack, name)


def same(two, one):
    """The same to rounding: each process reads the tokens that rows share for itself."""
    if isinstance(one, dict):
        assert two.keys() == one.keys()
        for name, value in one.items():
            same(two[name], value)
    elif isinstance(one, list):
        for ours, alone in zip(two, one, strict=True):
            same(ours, alone)
    else:
        assert two == (pytest.approx(one, rel=1e-5, abs=1e-6) if isinstance(one, float) else one)


def same_records(place, stack, name, rtol=1e-5, atol=1e-6):
    two, one = (read_records(place / folder / name) for folder in (stack, "alone"))
    assert len(two) == len(one) > 1
    for ours, alone in zip(two, one, strict=True):
        assert_close(ours["metrics"], alone["metrics"], rtol=rtol, atol=atol)


def test_two_processes_compare_and_distil_as_one(place):
    done = launched(place, STACKS["ddp"], list(further(place, "ddp")))
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("report:") == 1
    assert done.stdout.count("student in") == 1
    for folder in ("compared", "student"):
        assert names(place / "ddp" / folder) == names(place / "alone" / folder)
    same_records(place, "ddp", "compared", rtol=1e-3, atol=1e-4)
    file = "student/adapter_model.safetensors"
    assert_close(load_file(place / "ddp" / file), load_file(place / "alone" / file))


REFUSED = [
    ("zero3", "ensemble", "Ensemble goes on after a training: got it under ZeRO-3"),
    ("fsdp2", "distilled", "Distilled goes on after a training: got it under FSDP 2"),
    ("zero2", "scalabl", "ZeRO-2 keeps what is trained in parts: got FactorKL"),
    ("fsdp2", "ivon", "FSDP 2 keeps what is trained in parts: got DrawBeforeStep"),
]


@pytest.mark.parametrize(("stack", "method", "said"), REFUSED)
def test_what_a_launcher_would_break_is_refused_at_the_start(stack, method, said, place):
    command = fitting(place, "fit", f"refused-{method}", **TRAINING, method=method)
    done = launched(place, STACKS[stack], [command])
    assert done.returncode
    assert said in done.stderr
    assert not (place / f"refused-{method}/adapter_model.safetensors").exists()
