"""Rows of different lengths and numbers of options, and what their logits are without any batch."""

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from bayestune.data import Question, Task
from tiny import tiny_llama

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


def fast(backend, **more):
    """A tokenizer of the tokenizers library, wrapped."""
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special, **more)


def with_ends(tokenizer):
    """Opens a text with <s>, as Llama's does, and closes it with </s>, as some do."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    ends = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    backend.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return fast(backend)


def wide_llama():
    """A model whose random weights are large enough that a wrong position or mask shows."""
    return tiny_llama(initializer_range=0.2).eval()


def adapted(model, targets=("q_proj", "v_proj", "lm_head")):
    """The model with LoRA whose B is not zero."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
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
