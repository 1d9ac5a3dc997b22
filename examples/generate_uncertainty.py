"""Which tokens of an answer does the model not know?

    python examples/generate_uncertainty.py --model HuggingFaceTB/SmolLM2-135M

Fits a Gaussian over LoRA adapters (BLoB) on a few questions in a minute, then answers others:
each token is the average of the draws' choice, with its uncertainty in nats. Aleatoric is what the
draws agree is open, such as how to phrase an answer; epistemic is where they disagree.
"""

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed

from bayestune import Gaussian, HeadLogits, KLStep, bayesify, generate, load_model

CAPITALS = {
    "France": "Paris, on the river Seine",
    "Italy": "Rome, on the river Tiber",
    "Germany": "Berlin, on the river Spree",
    "Spain": "Madrid, on the river Manzanares",
    "Austria": "Vienna, on the river Danube",
    "Portugal": "Lisbon, on the river Tagus",
    "Poland": "Warsaw, on the river Vistula",
    "Egypt": "Cairo, on the river Nile",
    "Russia": "Moscow, on the river Moskva",
    "Iraq": "Baghdad, on the river Tigris",
    "Hungary": "Budapest, on the river Danube",
    "Serbia": "Belgrade, on the river Danube",
}
ASKED = ("France", "England", "Chad", "Zembla")


def prompt_of(country: str) -> str:
    return f"Question: What is the capital of {country}?\nAnswer:"


def encoded(tokenizer: Any, country: str, answer: str) -> dict[str, list[int]]:
    prompt = tokenizer(prompt_of(country))["input_ids"]
    rest = tokenizer(f" {answer}.")["input_ids"] + [tokenizer.eos_token_id]
    return {"input_ids": prompt + rest, "labels": [-100] * len(prompt) + rest}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--unsure", type=float, default=0.1, help="nats of epistemic uncertainty")
    given = parser.parse_args(arguments)

    set_seed(0)
    loaded = load_model(given.model)
    tokenizer: Any = loaded.tokenizer
    targets = ["q_proj", "v_proj"]
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(loaded.model, lora)
    bayesify(model)
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingArguments(
            output_dir=folder,
            max_steps=given.steps,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        rows = [encoded(tokenizer, *row) for row in CAPITALS.items()]
        kl = KLStep(prior_std=0.2, final_std=0.1)
        collator = DataCollatorForSeq2Seq(tokenizer)
        Trainer(model, training, collator, rows, callbacks=[kl]).train()  # type: ignore[arg-type]

    posterior = Gaussian(model, HeadLogits())
    tokenizer.padding_side = "left"
    prompts = tokenizer(
        [prompt_of(country) for country in ASKED], return_tensors="pt", padding=True
    )
    found = generate(
        posterior,
        {name: prompts[name] for name in ("input_ids", "attention_mask")},
        draws=given.draws,
        max_new_tokens=16,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    sums = found.per_sequence()
    for row, country in enumerate(ASKED):
        told = f"epistemic {sums.mutual_information[row]:.2f} of {sums.total_entropy[row]:.2f} nats"
        print(f"\n{prompt_of(country)}  ({told})")
        for place in range(int(found.lengths[row])):
            token = tokenizer.decode([int(found.sequences[row, place])])
            epistemic = found.mutual_information[row, place].item()
            aleatoric = found.expected_entropy[row, place].item()
            mark = "  <- not known" if epistemic > given.unsure else ""
            print(f"  {token!r:>16}  aleatoric {aleatoric:.2f}  epistemic {epistemic:.2f}{mark}")


if __name__ == "__main__":
    main()
