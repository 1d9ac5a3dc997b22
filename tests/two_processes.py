"""What two gloo processes do with a KL step, a JSON line each: RANK PORT KIND, some kinds."""

import json
import os
import sys

import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from bayestune.adapters import GaussianLinear, bayesify
from bayestune.errors import Refusal
from bayestune.kl import KLStep
from tiny import adapted, tiny_llama

STEPS = 4


def train(model, optimizer, rank):
    torch.manual_seed(rank)  # rows and noise of its own
    for _ in range(STEPS):
        ids = torch.randint(3, 400, (2, 6))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, GaussianLinear)]


def run(kind, rank):
    torch.manual_seed(5)
    model = adapted(tiny_llama()).train()
    if kind == "wrapped before":
        model = DistributedDataParallel(model)
        bayesify(model.module)
    else:
        bayesify(model)
        if kind == "ddp":
            model = DistributedDataParallel(model)
    whole = None
    if kind == "fsdp2":
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        whole = KLStep()
        whole.attach(model, optimizer, total_steps=STEPS)
        whole.detach()
        whole = whole.state_of_kl()["kl"]
        fully_shard(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    step = KLStep(std_lr=1.0)
    step.attach(model, optimizer, total_steps=STEPS)
    first = step.state_of_kl()["kl"]
    try:
        train(model, optimizer, rank)
    except Refusal as refusal:
        return {"refused": str(refusal)}
    roots = [layer.root_std.detach() for layer in layers_of(model)]
    roots = [root.full_tensor() if hasattr(root, "full_tensor") else root for root in roots]
    std = sum(float(root.square().mean()) for root in roots) / len(roots)
    bits = [root.sum(dtype=torch.float64).item() for root in roots]
    return {"std": std, "bits": bits, "kl": [whole, first]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[2]}
    distributed.init_process_group("gloo", rank=int(sys.argv[1]), world_size=2)
    for kind in sys.argv[3:]:
        print(json.dumps(run(kind, int(sys.argv[1]))), flush=True)
    distributed.destroy_process_group()
