"""The run that `test_training` kills: started in a process of its own."""

import json
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from bayestune.adapters import Lora, bayesify
from bayestune.kl import KLStep
from bayestune.training import Training, start_adapter, train


class Colours:
    """A scorer of made-up rows: enough for the engine, with no tokenizer."""

    class task:
        name = "colours"
        train = tuple(type("Row", (), {"answer": i % 3})() for i in range(24))

    def encode(self, rows):
        return [
            {"ids": [3 + (7 * i + j) % 90 for j in range(9)], "answer": row.answer}
            for i, row in enumerate(rows)
        ]

    def collate(self, rows):
        return {
            "input_ids": torch.tensor([r["ids"] for r in rows]),
            "labels": torch.tensor([r["answer"] for r in rows]),
        }

    def __call__(self, model, batch):
        return model(input_ids=batch["input_ids"]).logits[:, -1, :3]


class Slow(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(0.15)


def run(folder: Path, resume: bool, slow: bool) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    base = LlamaForCausalLM(LlamaConfig(vocab_size=100, **settings))
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
    model = start_adapter(base, training)
    bayesify(model)
    callbacks = [KLStep(final_std=0.1), *([Slow()] if slow else [])]
    fitted = train(model, Colours(), training, callbacks)
    state = {
        name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad
    }
    (folder / "log.json").write_text(
        json.dumps([entry for entry in fitted.history if "loss" in entry])
    )
    save_file(state, folder / "final.safetensors")
