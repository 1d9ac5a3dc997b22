"""A class for every token, with its uncertainty: is it a name?

python examples/token_classification.py --model google-bert/bert-base-uncased
"""

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from bayestune import Gaussian, HeadLogits, KLStep, bayesify, predict

NAMES = ("Anna", "Peter", "Maria", "Thomas", "Julia", "Martin", "Laura", "Simon")
PLACES = ("garden", "station", "library", "harbour")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="google-bert/bert-base-uncased")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--draws", type=int, default=10)
    given = parser.parse_args(arguments)

    set_seed(0)
    tokenizer: Any = AutoTokenizer.from_pretrained(given.model)
    base = AutoModelForTokenClassification.from_pretrained(given.model, num_labels=2)
    lora = LoraConfig(task_type="TOKEN_CLS")
    model = get_peft_model(base, lora)
    bayesify(model)

    rows = []
    for name in NAMES:
        for place in PLACES:
            words = ["Yesterday", name, "walked", "to", "the", place, "."]
            row = tokenizer(words, is_split_into_words=True)
            labels = [-100 if word is None else int(word == 1) for word in row.word_ids()]
            rows.append({**row, "labels": labels})
    collator = DataCollatorForTokenClassification(tokenizer)
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
    asked = ["Yesterday Laura walked to the harbour .", "Tomorrow Rosemary grows near the wall ."]
    inputs = [dict(tokenizer(text)) for text in asked]
    found = predict(posterior, inputs, given.draws)
    for row, text in enumerate(asked):
        print(text)
        for place, token in enumerate(inputs[row]["input_ids"]):
            p = found.probabilities[row, place, 1].item()
            unknown = found.mutual_information[row, place].item()
            print(f"  {tokenizer.decode([token]):>12}  name {p:.2f}  epistemic {unknown:.3f} nats")


if __name__ == "__main__":
    main()
