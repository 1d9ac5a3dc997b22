"""The run that `test_training` kills, in a process of its own: FOLDER [resume] [slow]."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from bayestune.adapters import Lora, bayesify
from bayestune.kl import KLStep
from bayestune.training import Training, fit_adapter

SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


class Colours:
    """A scorer of made-up rows: enough for the engine, with no tokenizer."""

    task = SimpleNamespace(name="colours", train=[SimpleNamespace(answer=i % 3) for i in range(24)])

    def encode(self, rows):
        tokens = 3 + (7 * torch.arange(len(rows))[:, None] + torch.arange(9)) % 90
        return [{"ids": ids, "answer": row.answer} for ids, row in zip(tokens, rows, strict=True)]

    def collate(self, rows):
        return {
            "input_ids": torch.stack([row["ids"] for row in rows]),
            "labels": torch.tensor([row["answer"] for row in rows]),
        }

    def __call__(self, model, batch):
        return model(input_ids=batch["input_ids"]).logits[:, -1, :3]


class Slow(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(0.15)


def run(folder, resume, slow):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    training = Training(
        lora=Lora(targets=("q_proj", "v_proj"), dropout=0.1),
        steps=20,
        learning_rate=1e-2,
        save_steps=3,
        output=folder,
        resume=resume,
        progress=False,
        logging_steps=1,
    )
    callbacks = [KLStep(final_std=0.1), *([Slow()] if slow else [])]
    base = LlamaForCausalLM(LlamaConfig(**SIZES))
    model, report = fit_adapter(base, Colours(), training, callbacks, prepare=bayesify)
    lines = [line for line in report.history if "loss" in line]
    (folder / "log.json").write_text(json.dumps(lines))
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    save_file(state, folder / "final.safetensors")


if __name__ == "__main__":
    run(Path(sys.argv[1]), "resume" in sys.argv, "slow" in sys.argv)
