"""Some bayestune commands under any launcher, one after the other: STACK COMMANDS (JSON each).

Each process writes `exit-N.json`, the codes they ended with, where the stack says.
"""

import faulthandler
import json
import os
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


def run(command):
    """The code that a command ends with, as if it were alone in its process."""
    code = main(command)
    unset_hf_deepspeed_config()
    return code


if __name__ == "__main__":
    torch.set_num_threads(1)
    # processes that wait for each other say where
    faulthandler.dump_traceback_later(float(os.environ.get("PATIENCE", "200")), exit=True)
    with noise(STACK.get("noise")):
        codes = [run(command) for command in json.loads(sys.argv[2])]
    if "codes" in STACK:
        rank = os.environ.get("RANK", "0")
        Path(STACK["codes"], f"exit-{rank}.json").write_text(json.dumps(codes), encoding="utf-8")
