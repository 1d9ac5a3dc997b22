"""The examples of generation and of the likelihoods run, on tiny models."""

import importlib.util
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from tiny import SIZES, tiny_llama

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, *arguments):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A tiny encoder with a tokenizer of characters, in a folder."""
    folder = tmp_path_factory.mktemp("bert")
    characters = {name: i for i, name in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]"))}
    characters |= {chr(code): code for code in range(32, 127)}
    tokenizer = Tokenizer(models.WordPiece(characters, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=ends
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    special["sep_token"] = "[SEP]"
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.save_pretrained(folder)
    BertModel(BertConfig(**SIZES)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("regression", "There are two coins."),
        ("multi_label", "delivery"),
        ("token_classification", "epistemic"),
        ("reward", "best of 4: "),
    ],
)
def test_an_example_runs(name, told, bert, capsys):
    run(name, "--model", bert, "--steps", 2, "--draws", 3)
    assert told in capsys.readouterr().out


def test_the_example_of_generation_names_tokens(tmp_path, byte_level, capsys):
    tiny_llama(initializer_range=0.3).save_pretrained(tmp_path)
    byte_level.save_pretrained(tmp_path)
    arguments = ("--model", tmp_path, "--steps", 2, "--draws", 3, "--unsure", 0.0001)
    run("generate_uncertainty", *arguments)
    out = capsys.readouterr().out
    assert out.count("What is the capital of") == 4
    assert "<- not known" in out
