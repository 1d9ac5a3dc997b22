"""An encoder with a classification head, in a stock Trainer: probabilities and what is not known.

    python examples/encoder_classifier.py --model google-bert/bert-base-uncased

Fits a Gaussian over LoRA adapters to sentences about food, sport and music; the head is trained
beside them. Expect sure answers to sentences like these, and more epistemic uncertainty about
those that are of no class, or of two.
"""

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

from bayestune import Gaussian, HeadLogits, KLStep, bayesify, load_model, predict

CLASSES = {
    "food": ("the soup was hot", "she baked a cake", "they ate bread", "he likes rice"),
    "sport": ("he won the race", "they lost the match", "she scored a goal", "we ran a mile"),
    "music": ("she plays the violin", "the choir sang", "a song in minor", "he bought a drum"),
}
ASKED = ("they baked bread", "she won the match", "the train is late", "a song about rice")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="google-bert/bert-base-uncased")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--draws", type=int, default=10)
    given = parser.parse_args(arguments)

    set_seed(0)
    loaded = load_model(given.model, num_labels=len(CLASSES))
    tokenizer: Any = loaded.tokenizer
    model = get_peft_model(loaded.model, LoraConfig(task_type="SEQ_CLS"))
    bayesify(model)

    rows: Any = []
    for label, texts in enumerate(CLASSES.values()):
        rows += [{**tokenizer(text), "labels": label} for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingArguments(
            output_dir=folder,
            max_steps=given.steps,
            per_device_train_batch_size=6,
            learning_rate=1e-3,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        kl = KLStep(prior_std=0.2, final_std=0.1)
        Trainer(model, training, DataCollatorWithPadding(tokenizer), rows, callbacks=[kl]).train()

    inputs = tokenizer(list(ASKED), padding=True, return_tensors="pt")
    found = predict(Gaussian(model, HeadLogits()), dict(inputs), given.draws)
    for row, text in enumerate(ASKED):
        best = int(found.probabilities[row].argmax())
        p, nats = found.probabilities[row, best].item(), found.mutual_information[row].item()
        print(f"{text:24} {list(CLASSES)[best]:6} {p:.2f}  epistemic {nats:.3f} nats")


if __name__ == "__main__":
    main()
