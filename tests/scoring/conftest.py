"""Tokenizers and a model in which a wrong token, position or mask shows."""

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast


@pytest.fixture(params=["byte_level", "sentencepiece"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def fast():
    """Wraps a tokenizer of the tokenizers library."""
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return lambda backend, **more: PreTrainedTokenizerFast(
        tokenizer_object=backend, **special, **more
    )


@pytest.fixture
def with_bos(byte_level, fast):
    """Opens a text with <s>, as Llama's does, and closes it with </s>, as some do."""
    backend = Tokenizer.from_str(byte_level.backend_tokenizer.to_str())
    ends = [("<s>", byte_level.bos_token_id), ("</s>", byte_level.eos_token_id)]
    backend.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return fast(backend)


@pytest.fixture
def wide(llama):
    """A model whose random weights are large enough that a wrong position or mask shows."""
    return llama(initializer_range=0.2).eval()
