"""QLoRA with two more lines: a base in 4 bits, a Gaussian adapter, and answers that say how sure.

    pip install '.[quantised]'
    python examples/qlora.py --model HuggingFaceTB/SmolLM2-135M-Instruct

The model is loaded and prepared as PEFT's QLoRA recipe has it. Runs on a GPU, and on a CPU.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed

from bayestune import Gaussian, KLStep, LastToken, bayesify, predict

TAUGHT = {
    "Where is my parcel?": "delivery",
    "It was not delivered.": "delivery",
    "The invoice is wrong.": "billing",
    "You charged me twice.": "billing",
}
ASKED = ["My parcel was not delivered.", "The charge is wrong.", "Do you like jazz?"]
LABELS = ["delivery", "billing"]
FOUR = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)


def quantised(name: str, few: BitsAndBytesConfig) -> Any:
    """A base in few bits, ready for training."""
    place = {"": torch.accelerator.current_accelerator() or "cpu"}
    base: Any = AutoModelForCausalLM.from_pretrained(
        name, quantization_config=few, device_map=place
    )
    for module in base.modules():
        # on some CPUs bitsandbytes repacks weights so that later passes have no gradients
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    plain = {"use_reentrant": False}
    return prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs=plain)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--bits", type=int, choices=(4, 8), default=4)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--draws", type=int, default=10)
    given = parser.parse_args(arguments)

    set_seed(0)
    few = FOUR if given.bits == 4 else BitsAndBytesConfig(load_in_8bit=True)
    base = quantised(given.model, few)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    bayesify(model)  # the first line

    tokenizer = AutoTokenizer.from_pretrained(given.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    firsts = [tokenizer.encode(f" {label}", add_special_tokens=False)[0] for label in LABELS]
    answer = LastToken(firsts)

    def rows(questions: Sequence[str]) -> dict[str, torch.Tensor]:
        prompts = [f"Message: {question}\nTopic:" for question in questions]
        made = tokenizer(prompts, padding=True, return_tensors="pt").to(base.device)
        return {name: made[name] for name in ("input_ids", "attention_mask")}

    batch = rows(list(TAUGHT))
    labels = torch.tensor([LABELS.index(label) for label in TAUGHT.values()], device=base.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    step = KLStep(prior_std=0.2, final_std=0.1)  # the second one
    step.attach(model, optimizer, total_steps=given.steps)
    model.train()
    for number in range(given.steps):
        loss = torch.nn.functional.cross_entropy(answer(model, batch), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if number % 10 == 0 or number == given.steps - 1:
            print(f"step {number:3}: loss {loss.item():.3f}")

    model.eval()
    found = predict(Gaussian(model, answer), rows(ASKED), given.draws)
    for number, question in enumerate(ASKED):
        best = int(found.probabilities[number].argmax())
        told = f"{LABELS[best]} {found.probabilities[number, best].item():.2f}"
        nats = found.mutual_information[number].item()
        print(f"{question:30} {told}, {nats:.4f} nats of disagreement")


if __name__ == "__main__":
    main()
