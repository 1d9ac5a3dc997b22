"""A number with its variance: how much of it is noise, how much the model does not know.

    python examples/regression.py --model google-bert/bert-base-uncased

Fits a Gaussian over LoRA adapters to noisy numbers, the noise on held-out rows, and predicts.
"""

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from bayestune import Gaussian, HeadLogits, KLStep, Regression, bayesify, load_model, predict

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
THINGS = ("apples", "birds", "stones", "letters", "boats", "lamps", "coins", "roads")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="google-bert/bert-base-uncased")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--draws", type=int, default=10)
    given = parser.parse_args(arguments)

    set_seed(0)
    loaded = load_model(given.model, num_labels=1)
    tokenizer: Any = loaded.tokenizer
    lora = LoraConfig(task_type="SEQ_CLS")
    model = get_peft_model(loaded.model, lora)
    bayesify(model)

    rows = []
    for thing in THINGS:
        for value, number in enumerate(NUMBERS, 1):
            noisy = value / 10 + 0.1 * torch.randn(()).item()
            rows.append({**tokenizer(f"There are {number} {thing}."), "labels": [noisy]})
    held_out = rows[-9:]
    rows = rows[:-9]
    collator = DataCollatorWithPadding(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingArguments(
            output_dir=folder,
            max_steps=given.steps,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(
            model, training, collator, rows, callbacks=[KLStep(prior_std=0.2, final_std=0.1)]
        )
        trainer.train()

    posterior = Gaussian(model, HeadLogits())
    before = predict(posterior, held_out, given.draws, likelihood="regression")
    likelihood = Regression.fitted(before, torch.tensor([row["labels"] for row in held_out]))
    asked = ["There are two coins.", "There are eight coins.", "Nobody counted the whales."]
    found = predict(
        posterior, [dict(tokenizer(text)) for text in asked], given.draws, likelihood=likelihood
    )
    assert found.aleatoric is not None
    for row, text in enumerate(asked):
        noise, unknown = found.aleatoric[row].item(), found.epistemic[row].item()
        print(f"{text:28} {found.mean[row].item():.2f} ± {found.std[row].item():.2f}")
        print(f"{'':28} variance: noise {noise:.4f}, not known {unknown:.4f}")


if __name__ == "__main__":
    main()
