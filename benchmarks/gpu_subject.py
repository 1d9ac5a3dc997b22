"""What `gpu.py` measures on: Llamas of known geometries with random weights, random prompts, and adapted models."""

from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from bayestune.adapters import Lora, attach, bayesify
from bayestune.forward import Draws
from bayestune.forward.common_prefix import without_common_prefix
from bayestune.posteriors import Gaussian
from bayestune.scoring import LetterScorer
from draws import as_if_trained
from subjects import (
    STOCK,
    Prompts,
    TrainingStep,
    autocast,
    on,
    random_tokens,
    token_loss,
    training_step,
    twin,
)

OURS = "row"
GEOMETRIES: dict[str, dict[str, Any]] = {
    "llama2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "llama31-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


def random_model(geometry: str, device: torch.device) -> nn.Module:
    """A Llama of the geometry, bfloat16 weights drawn on the device itself, the head not tied to the embedding."""
    config = LlamaConfig(**GEOMETRIES[geometry], tie_word_embeddings=False)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


class RandomLetters(LetterScorer):
    """Letter scoring of random prompts: the options' tokens are the vocabulary's first, no tokenizer finds them."""

    tokens = [0, 1, 2, 3]  # noqa: RUF012  (a scorer's tokens are never changed)
    pad = 0

    def __init__(self) -> None:
        """Has neither tokenizer nor task: `collate` and the scoring itself need none."""


class Subject:
    """A geometry's models, all over one set of base weights and each made when a section first asks for it."""

    def __init__(self, geometry: str, options: Namespace, device: torch.device) -> None:
        self.geometry, self.options, self.device = geometry, options, device
        self._models: dict[str, PeftModel] = {}

    @cached_property
    def base(self) -> nn.Module:
        """The base model; adapters go to its twins only."""
        return random_model(self.geometry, self.device)

    def model(self, name: str) -> PeftModel:
        """The adapted model of a name, in training mode: stock LoRA, or BLoB with that kind of noise."""
        if name not in self._models:
            self._models[name] = self.adapted(name)
        return self._models[name]

    def adapted(self, name: str) -> PeftModel:
        """The same, a new one."""
        lora = Lora(self.options.rank, 2 * self.options.rank, targets=tuple(self.options.targets))
        model = attach(twin(self.base), lora)
        if not name.startswith(STOCK):
            bayesify(model, noise=name)  # type: ignore[arg-type]
        return model.train()

    def tokens(self, rows: int) -> Tensor:
        """A batch of random tokens."""
        return random_tokens(
            GEOMETRIES[self.geometry]["vocab_size"], rows, self.options.length, self.device
        )

    def steps(self, rows: int, names: Iterable[str] = (OURS, STOCK)) -> dict[str, TrainingStep]:
        """Training steps on one batch, in autocast, with the last position's logits only."""
        loss = token_loss(self.tokens(rows), "last")
        return {name: training_step(self.model(name), name, loss, "bf16") for name in names}

    def prompts(self, rows: int) -> Prompts:
        """A batch of random prompts of four options, as letter scoring collates them."""
        scorer, ids = RandomLetters(), self.tokens(rows).tolist()
        batch = scorer.collate(
            [{"ids": ids[i], "options": 4, "answer": i % 4} for i in range(rows)]
        )
        return Prompts(self.base, scorer, [on(self.device, batch)])

    @cached_property
    def posterior(self) -> Gaussian:
        """A posterior as if trained."""
        return as_if_trained(self.adapted(OURS), RandomLetters())

    def scored(self, rows: int) -> Callable[[Draws], Tensor]:
        """Gives the class logits (S, N, C) of draws on one batch."""
        (batch,) = self.prompts(rows).batches

        def logits(draws: Draws) -> Tensor:
            with (
                without_common_prefix(),
                autocast(self.device, "bf16"),
            ):  # one batch again and again is all prefix
                return self.posterior.logits(batch, draws)

        return logits

    def size(self, rows: int) -> str:
        """A batch as text."""
        return f"{rows}×{self.options.length} tokens"


@contextmanager
def checkpointed(models: Iterable[nn.Module], active: bool) -> Iterator[None]:
    """Gradient checkpointing in the models for the time of the context."""
    chosen: list[Any] = list(models) if active else []
    for model in chosen:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        for model in chosen:
            model.gradient_checkpointing_disable()
