"""A script of your own in several processes: `accelerate launch` and the two lines.

    accelerate launch --multi_gpu --num_processes 2 examples/accelerate_fit.py
    accelerate launch --use_fsdp --fsdp_version 2 … examples/accelerate_fit.py

`--batch_size` is the batch of all processes together, so that the fit is the same whatever their
number. On a machine without accelerators set `ACCELERATE_USE_CPU=true`. docs/scale.md has the
launcher's options in full.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed

from bayestune import KLStep, bayesify, load_model

CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Austria": "Vienna"}


def rows_of(tokenizer: Any) -> list[dict[str, list[int]]]:
    rows = []
    for country, capital in CAPITALS.items():
        ids = tokenizer(f"The capital of {country} is {capital}.")["input_ids"]
        rows.append({"input_ids": ids, "labels": ids})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M")
    parser.add_argument("--output", type=Path, default=Path("runs/accelerate_fit"))
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args(arguments)

    arguments_of_trainer = TrainingArguments(
        output_dir=str(given.output),
        max_steps=given.steps,
        learning_rate=2e-3,
        logging_steps=5,
        report_to=[],
        use_cpu=not torch.accelerator.is_available(),
    )
    processes = arguments_of_trainer.world_size
    if given.batch_size % processes:
        raise SystemExit(f"--batch_size must be a multiple of {processes}, the processes")
    arguments_of_trainer.per_device_train_batch_size = given.batch_size // processes

    set_seed(0)  # the same adapter in all processes
    loaded = load_model(given.model)
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(loaded.model, lora)
    bayesify(model)
    trainer = Trainer(
        model,
        arguments_of_trainer,
        train_dataset=rows_of(loaded.tokenizer),  # type: ignore[arg-type]
        data_collator=DataCollatorForSeq2Seq(loaded.tokenizer),
        callbacks=[KLStep(final_std=0.1)],
    )
    trainer.train()
    trainer.save_model()  # called by all processes; the first writes a posterior
    if trainer.is_world_process_zero():
        print(f"posterior in {given.output}; load it with bayestune.load_posterior")


if __name__ == "__main__":
    main()
