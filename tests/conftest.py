"""Fixtures around the tiny models, tokenizers and tasks of `tiny.py`."""

import os
from collections.abc import Callable

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers import BertForSequenceClassification, LlamaForCausalLM, PreTrainedTokenizerFast

from bayestune import Task
from tiny import (
    byte_level_tokenizer,
    coloured_questions,
    labelled_sentences,
    sentencepiece_tokenizer,
    tiny_bert,
    tiny_llama,
)

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def byte_level() -> PreTrainedTokenizerFast:
    return byte_level_tokenizer()


@pytest.fixture(scope="session")
def sentencepiece() -> PreTrainedTokenizerFast:
    return sentencepiece_tokenizer()


@pytest.fixture
def llama() -> Callable[..., LlamaForCausalLM]:
    return tiny_llama


@pytest.fixture
def bert() -> Callable[..., BertForSequenceClassification]:
    return tiny_bert


@pytest.fixture(scope="session")
def labelled_task() -> Task:
    return labelled_sentences()


@pytest.fixture(scope="session")
def tiny_task() -> Task:
    return coloured_questions()
