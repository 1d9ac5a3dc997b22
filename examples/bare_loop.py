"""A training loop of your own: the KL step hooks to the optimiser, and nothing else changes.

    python examples/bare_loop.py --model HuggingFaceTB/SmolLM2-135M

Fits a Gaussian over LoRA adapters to short reviews. Expect sure answers to reviews like those
that were read, and more disagreement of the draws where a review says both or neither.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from bayestune import Gaussian, KLStep, LastToken, bayesify, load_model, predict

WORDS = {" good": ("lovely", "superb", "delightful"), " bad": ("dull", "tedious", "awful")}
THINGS = ("film", "book", "meal", "concert")
ASKED = ("a superb concert", "an awful book", "a film of ninety minutes", "superb, then awful")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--draws", type=int, default=10)
    given = parser.parse_args(arguments)

    torch.manual_seed(0)
    loaded = load_model(given.model)
    tokenizer: Any = loaded.tokenizer
    tokenizer.padding_side = "left"
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(loaded.model, lora)
    bayesify(model)

    answers = [tokenizer.encode(word, add_special_tokens=False)[0] for word in WORDS]
    rows = []
    for label, words in enumerate(WORDS.values()):
        rows += [(f"a {word} {thing}", label) for word in words for thing in THINGS]

    def encoded(reviews: Sequence[str]) -> Any:
        prompts = [f"Review: {review}. My verdict:" for review in reviews]
        return dict(tokenizer(prompts, padding=True, return_tensors="pt"))

    score = LastToken(answers)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    KLStep(prior_std=0.2, final_std=0.1).attach(model, optimizer, total_steps=given.steps)
    model.train()
    for _ in range(given.steps):
        batch = [rows[i] for i in torch.randperm(len(rows))[:8]]
        labels = torch.tensor([label for _, label in batch])
        logits = score(model, encoded([review for review, _ in batch]))
        torch.nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    found = predict(Gaussian(model, score), encoded(ASKED), given.draws)
    for row, review in enumerate(ASKED):
        good = found.probabilities[row, 0].item()
        nats = found.mutual_information[row].item()
        print(f"{review:28} good {good:.2f}, {nats:.4f} nats of disagreement")


if __name__ == "__main__":
    main()
