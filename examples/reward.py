"""A reward model that knows where it does not know: best of n by mean − k·std over draws.

    python examples/reward.py --model google-bert/bert-base-uncased

Fits a Gaussian over LoRA adapters to preferences (Bradley–Terry). Both sides of a pair are one row,
so they share a draw in training.
"""

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    Trainer,
    TrainingArguments,
    set_seed,
)

from bayestune import Gaussian, HeadLogits, KLStep, bayesify, group_rows, load_model, predict

POLITE = ("Thank you, I will gladly help.", "Of course, here it is.", "Happy to explain that.")
RUDE = ("No.", "Find it yourself.", "What a stupid question.")


class RewardTrainer(Trainer):
    """The loss −log σ(r(chosen) − r(rejected)) of batches whose rows are pairs, side by side."""

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        group_rows(model, 2)
        outputs = model(**inputs)
        chosen, rejected = outputs.logits.unflatten(0, (-1, 2))[..., 0].unbind(1)
        loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
        return (loss, outputs) if return_outputs else loss


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

    def collator(pairs: list[dict[str, Any]]) -> dict[str, Tensor]:
        texts = [text for pair in pairs for text in (pair["chosen"], pair["rejected"])]
        return dict(tokenizer(texts, padding=True, return_tensors="pt"))

    rows: Any = []
    for number in range(48):
        asked = f"Question {number}. "
        pair = {"chosen": asked + POLITE[number % 3], "rejected": asked + RUDE[number // 3 % 3]}
        rows.append(pair)
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingArguments(
            output_dir=folder,
            max_steps=given.steps,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = RewardTrainer(
            model, training, collator, rows, callbacks=[KLStep(prior_std=0.2, final_std=0.1)]
        )
        trainer.train()

    posterior = Gaussian(model, HeadLogits())
    candidates = [
        "Happy to help you.",
        "Whatever.",
        "zxq zxq zxq zxq help zxq",
        "I will explain it.",
    ]
    inputs = tokenizer(
        [f"Question. {text}" for text in candidates], padding=True, return_tensors="pt"
    )
    found = predict(posterior, dict(inputs), given.draws, likelihood="reward")
    cautious = found.lower(2.0)
    for row, text in enumerate(candidates):
        told = f"{found.mean[row].item():+.2f} ± {found.std[row].item():.2f}"
        print(f"{text:26} reward {told}, less two std {cautious[row].item():+.2f}")
    best = candidates[int(found.best_of(len(candidates), k=2.0))]
    print(f"best of {len(candidates)}: {best}")


if __name__ == "__main__":
    main()
