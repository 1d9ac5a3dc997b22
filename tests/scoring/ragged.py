"""Rows of different lengths and numbers of options, and what their logits are without any batch."""

import torch
from peft import LoraConfig, get_peft_model

from bayestune.adapters import adapted_layers
from bayestune.data import Question, Task

RAGGED = (
    Question("a", "what is red?", ("red", "the blue sky and grass", "green"), 1),
    Question("b", "what is the question for the answer and the passage?", ("sky", "grass"), 0),
    Question("c", "is sky?", ("green grass", "red", "the", "Return the label"), 3),
)
TASK = Task("ragged", RAGGED, ())
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def plain(tokenizer, text):
    """Token ids without special tokens."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def adapted(model, targets=("q_proj", "v_proj", "lm_head")):
    """The model with LoRA whose B is not zero."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    for layer in adapted_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
    return model


def mean_log_likelihood(model, prompt, option):
    """Of an option's tokens after the prompt, from one pass without padding."""
    logits = model(torch.tensor([prompt + option])).logits[0, len(prompt) - 1 : -1]
    chosen = logits.log_softmax(-1)[range(len(option)), option]
    return chosen.mean()


def naive_logits(model, rows):
    """Text scoring's class logits (N, C), a pass for each option."""
    width = max(len(row["options"]) for row in rows)
    logits = []
    for row in rows:
        scores = [mean_log_likelihood(model, row["ids"], option) for option in row["options"]]
        missing = [torch.tensor(-torch.inf)] * (width - len(scores))
        logits.append(torch.stack(scores + missing))
    return torch.stack(logits)
