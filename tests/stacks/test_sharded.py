"""A stock Trainer with the two lines in two gloo processes: DDP, FSDP2, DeepSpeed, against one."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from torch.testing import assert_close

from bayestune import load_posterior
from running import environment
from tiny import tiny_llama

pytestmark = pytest.mark.stacks

SCRIPT = Path(__file__).parent / "launched_trainer.py"
FSDP = (
    "--use_fsdp --fsdp_version=2 --fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP"
    " --fsdp_transformer_layer_cls_to_wrap=LlamaDecoderLayer"
)
FULL = f"{FSDP} --fsdp_state_dict_type=FULL_STATE_DICT"
PARTS = f"{FSDP} --fsdp_state_dict_type=SHARDED_STATE_DICT"


def zero(stage, **more):
    batch = dict.fromkeys(["train_micro_batch_size_per_gpu", "gradient_accumulation_steps"], "auto")
    own = {"stage": stage, "stage3_param_persistence_threshold": 0}
    own |= {"stage3_gather_16bit_weights_on_model_save": True} if stage == 3 else {}
    rest = {"gradient_clipping": "auto", "zero_allow_untested_optimizer": True}
    return {**batch, **rest, "zero_optimization": {**own, **more}}


STACKS = {
    "ddp": ("--multi_gpu", {}),
    "fsdp2": (FULL, {"sharded": True}),
    "fsdp2-in-parts": (PARTS, {"sharded": True}),
    "zero2": ("--multi_gpu", {"sharded": True, "deepspeed": zero(2)}),
    "zero3": ("--multi_gpu", {"sharded": True, "deepspeed": zero(3)}),
}


def launched(folder, flags, options):
    """Runs the script in two processes, in one without flags; the reports of all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = f"-m accelerate.commands.launch --num_machines=1 --num_processes=2 {flags}"
    launch += f" --main_process_port={port} --num_cpu_threads_per_process=1"
    folder.mkdir()
    told = json.dumps({"rows": 4 if flags else 8, **options})
    done = subprocess.run(
        [sys.executable, *(launch.split() if flags else ()), SCRIPT, folder, told],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env=environment(DS_ACCELERATOR="cpu"),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    reports = []
    for rank in range(2 if flags else 1):
        reports.append(json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8")))
    return reports


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process, all of whose rows see A = M + Ω."""
    return launched(tmp_path_factory.mktemp("alone") / "run", "", {"noise": "fixed"})[0]


@pytest.mark.parametrize("stack", STACKS)
def test_two_processes_train_predict_save_and_resume_as_one(stack, alone, tmp_path):
    flags, options = STACKS[stack]
    options = {"noise": "fixed", "save_steps": 3, **options}
    first, second = launched(tmp_path / "run", flags, options)
    # sums over rows in another order: some units of float32's last place, at numbers of this size
    for name in ("losses", "kl", "std", "draw", "logits"):
        assert_close(first[name], alone[name], rtol=1e-5, atol=2e-6)
    assert first == second
    assert_close(first["resumed"], first["draw"], rtol=1e-5, atol=2e-6)
    # a Trainer's save_model writes nothing where checkpoints are in parts
    for name in ("posterior",) if stack == "fsdp2-in-parts" else ("posterior", "saved"):
        folder = tmp_path / "run" / name
        loaded = load_posterior(tiny_llama(), folder).draw(0)
        assert {slot: weight.double().sum().item() for slot, weight in loaded.items()} == first[
            "draw"
        ]
    told = json.loads((tmp_path / "run/posterior/posterior.json").read_text(encoding="utf-8"))
    assert told["base_samples"]["tensors"]


@pytest.mark.parametrize("stack", ["fsdp2", "zero2"])
def test_with_noise_of_their_own_the_standard_deviation_is_equal_and_ends_where_it_should(
    stack, tmp_path
):
    flags, options = STACKS[stack]
    first, second = launched(tmp_path / "run", flags, {**options, "std_lr": 0.5})
    assert first["draw"] == second["draw"]
    assert first["std"] == second["std"]
    assert_close(first["std"][-1], 0.5, rtol=0.02, atol=0.0)
