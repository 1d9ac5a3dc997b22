"""Several labels a row, each with its own probability and uncertainty.

python examples/multi_label.py --model google-bert/bert-base-uncased
"""

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import (
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from bayestune import Gaussian, HeadLogits, KLStep, bayesify, load_model, predict

LABELS = ("billing", "delivery", "damage")
COMPLAINTS = (
    "the invoice is wrong",
    "the parcel came too late",
    "the screen was broken",
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="google-bert/bert-base-uncased")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--draws", type=int, default=10)
    given = parser.parse_args(arguments)

    set_seed(0)
    loaded = load_model(given.model, num_labels=3)
    tokenizer: Any = loaded.tokenizer
    lora = LoraConfig(task_type="SEQ_CLS")
    model = get_peft_model(loaded.model, lora)
    bayesify(model)

    rows = []
    for number in range(64):
        has = [float(number >> place & 1) for place in range(3)]
        parts = [text for text, there in zip(COMPLAINTS, has, strict=True) if there]
        text = " and ".join(parts) or "thank you for your help"
        rows.append({**tokenizer(f"Ticket {number}: {text}."), "labels": has})
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
    asked = [
        "Ticket: the invoice is wrong and the screen was broken.",
        "Ticket: the courier charged me twice.",
    ]
    inputs = [dict(tokenizer(text)) for text in asked]
    found = predict(posterior, inputs, given.draws, likelihood="sigmoid")
    for row, text in enumerate(asked):
        print(text)
        for place, label in enumerate(LABELS):
            p = found.probabilities[row, place].item()
            unknown = found.mutual_information[row, place].item()
            print(f"  {label:10} {p:.2f}  epistemic {unknown:.3f} nats")


if __name__ == "__main__":
    main()
