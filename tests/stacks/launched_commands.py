"""Some bayestune commands under any launcher, one after the other: STACK COMMANDS (JSON each).

Beside the program's own there is `cut FOLDER`: a fit's folder as a kill after step 3 leaves it.
"""

import faulthandler
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from as_accelerators import pretend, without_compiling
from launched_trainer import noise

STACK = json.loads(sys.argv[1])
if STACK.get("sharded"):
    pretend()
    without_compiling()

from transformers.integrations.deepspeed import unset_hf_deepspeed_config  # noqa: E402

from bayestune.cli import main  # noqa: E402
from bayestune.runtime import in_first_process  # noqa: E402

FITTING = ("fit", "compare", "distil")


def cut(folder):
    for path in folder.iterdir():
        if path.suffix == ".safetensors" or path.name == "posterior.json":
            path.unlink()
    shutil.rmtree(folder / "checkpoints/checkpoint-6")


def run(command):
    """Runs a command as if it were alone in its process; in fits all rows see one draw."""
    if command[0] == "cut":
        in_first_process(lambda: cut(Path(command[1])))
        return
    with noise("fixed" if command[0] in FITTING else None):
        code = main(command)
    unset_hf_deepspeed_config()
    if code:
        sys.exit(code)


if __name__ == "__main__":
    torch.set_num_threads(1)
    # processes that wait for each other say where
    faulthandler.dump_traceback_later(float(os.environ.get("PATIENCE", "300")), exit=True)
    for command in json.loads(sys.argv[2]):
        run(command)
