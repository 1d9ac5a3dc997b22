"""Chats with TRL's SFTTrainer: two more lines, and answers that say how sure they are.

    pip install trl
    python examples/trl_sft.py --model HuggingFaceTB/SmolLM2-135M-Instruct

Fits a Gaussian over LoRA adapters to chats whose answers are one word, with the loss on the
assistant's turns alone, and asks questions like those that were taught, and others.
"""

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from bayestune import Gaussian, KLStep, LastToken, bayesify, load_model, predict

TAUGHT = {
    "Where is my parcel?": "delivery",
    "It was not delivered.": "delivery",
    "The invoice is wrong.": "billing",
    "You charged me twice.": "billing",
}
ASKED = ["My parcel was not delivered.", "The charge is wrong.", "Do you like jazz?"]
LABELS = ["delivery", "billing"]


def chat(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--draws", type=int, default=10)
    given = parser.parse_args(arguments)

    set_seed(0)
    loaded = load_model(given.model)
    tokenizer: Any = loaded.tokenizer
    lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(loaded.model, lora)
    bayesify(model)

    chats = [chat(*pair) for pair in TAUGHT.items()]
    with tempfile.TemporaryDirectory() as folder:
        training = SFTConfig(
            output_dir=folder,
            max_steps=given.steps,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            bf16=torch.cuda.is_available(),
            assistant_only_loss=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            model,
            training,
            train_dataset=Dataset.from_dict({"messages": chats * 8}),
            processing_class=tokenizer,
            callbacks=[KLStep(prior_std=0.2, final_std=0.1)],
        )
        trainer.train()

    firsts = [tokenizer.encode(label, add_special_tokens=False)[0] for label in LABELS]
    posterior = Gaussian(model, LastToken(firsts))
    for question in ASKED:
        turns = chat(question, "")[:1]
        inputs = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        rows = {name: torch.as_tensor(inputs[name]) for name in ("input_ids", "attention_mask")}
        found = predict(posterior, rows, given.draws)
        best = int(found.probabilities[0].argmax())
        told = f"{LABELS[best]} {found.probabilities[0, best].item():.2f}"
        nats = found.mutual_information[0].item()
        print(f"{question:30} {told}, {nats:.4f} nats of disagreement")


if __name__ == "__main__":
    main()
