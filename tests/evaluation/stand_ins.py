"""Posteriors without a fit, and rows of different lengths and numbers of options."""

from dataclasses import replace

import torch

from bayestune.adapters import Lora, attach, bayesify
from bayestune.data import Question
from bayestune.posteriors import Gaussian
from bayestune.scoring import make_scorer

WORDS = ("sky", "red", "grass", "blue", "the", "A", "B", "C", "D")


def row(i):
    question = f"{WORDS[i]} is {'the answer for the passage ' * (-i % 4)}red?"
    return Question(f"{i}", question, ("sky", "grass", "red", "the")[: 2 + i % 3], i % 2)


ROWS = tuple(row(i) for i in range(9))


def random_adapter(llama):
    model = attach(llama(initializer_range=0.2), Lora(rank=4))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return model.eval()


def random_gaussian(llama, tokenizer, task, scoring="letter", root_std=0.7):
    """A random posterior, asked by a scorer."""
    model = random_adapter(llama)
    bayesify(model, init_root_std=root_std)
    scorer = make_scorer(model, tokenizer, replace(task, evaluation=ROWS), scoring)
    return Gaussian(model.eval(), scorer)


class Atoms:
    """A posterior of some atoms (S, C), the same for every row; notes what it is asked for.

    Like a model's, its logits are of as many options as a batch's rows have at most.
    """

    has_mean = False

    def __init__(self, model, values):
        self.model = model
        self.values = values
        self.atoms = len(values)
        self.asked = []

    def logits(self, inputs, draws):
        self.asked.append(draws)
        values = self.values[list(draws.indices)]
        values = values[:, None].expand(-1, len(inputs["input_ids"]), -1)
        return values[..., : inputs["option_mask"].shape[1]]
