"""`bayestune generate`: prompts in, texts with each token's uncertainty out."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bayestune import generate, load_posterior
from running import failed, fitting, furnish, read_rows, run, write_rows
from tiny import tiny_llama

PROMPTS = [
    {"id": "a", "prompt": "what is red and what is the question for the answer?"},
    {"prompt": "what is green?"},
    {"prompt": "Question: the sky"},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory, byte_level):
    """A folder with a fitted posterior, and prompts."""
    place = furnish(tmp_path_factory.mktemp("g"), tiny_llama(initializer_range=0.3), byte_level)
    noisy = {"learning_rate": 0.1, "blob.init_root_std": 0.7, "blob.prior_std": 1.0}
    run(*fitting(place, method="blob", scoring="letter", **noisy))
    write_rows(place / "prompts.jsonl", PROMPTS)
    return place


def asking(place, *options, posterior="out"):
    reading = (f"--posterior={place / posterior}", f"--input={place / 'prompts.jsonl'}")
    return ["generate", *reading, "--max_new_tokens=5", *options]


def test_texts_and_figures_are_those_of_generate(place):
    answers = place / "texts.jsonl"
    run(*asking(place, "--draws=3", "--batch_size=2", f"--output={answers}", "--overwrite"))
    lines = read_rows(answers)
    assert [line.get("id") for line in lines] == ["a", None, None]
    assert [line["prompt"] for line in lines] == [row["prompt"] for row in PROMPTS]
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    posterior = load_posterior(model, place / "out")
    for line in lines:
        prompt = tokenizer(line["prompt"], return_tensors="pt")
        inputs = {name: prompt[name] for name in ("input_ids", "attention_mask")}
        alone = generate(posterior, inputs, 3, max_new_tokens=5, do_sample=False)
        assert line["text"] == tokenizer.decode(alone.sequences[0], skip_special_tokens=True)
        for name in ("total_entropy", "expected_entropy", "mutual_information"):
            told = torch.tensor([token[name] for token in line["tokens"]])
            found = getattr(alone, name)[0].float()
            torch.testing.assert_close(told, found, rtol=1e-4, atol=1e-4)
            assert line[name] == pytest.approx(told.sum().item(), abs=1e-4)
        assert line["mutual_information"] > 0
        spoken = [token["log_probability"] for token in line["tokens"]]
        assert line["log_probability"] == pytest.approx(sum(spoken))


def test_samples_are_seeded_and_draws_may_write_apart(place, capsys):
    def lines(*options):
        capsys.readouterr()
        run(*asking(place, "--draws=3", *options))
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    sampled = lines("--do_sample", "--temperature=2.0", "--top_k=0")
    assert sampled == lines("--do_sample", "--temperature=2.0", "--top_k=0")
    other = lines("--do_sample", "--temperature=2.0", "--top_k=0", "--seed=1")
    assert [line["text"] for line in other] != [line["text"] for line in sampled]
    apart = lines("--draws_as=sequences")
    assert [len(line["texts"]) for line in apart] == [3, 3, 3]
    word = sampled[0]["tokens"][2]["token"]
    stopped = lines("--do_sample", "--temperature=2.0", "--top_k=0", f"--stop=[{word!r}]")
    assert len(stopped[0]["tokens"]) <= 3


def test_a_plain_adapter_writes_too(place, capsys):
    run(*fitting(place, method="mle", output="mle"))
    for name in ("posterior.json", "posterior.safetensors"):
        (place / "mle" / name).unlink(missing_ok=True)
    capsys.readouterr()
    run(*asking(place, posterior="mle"))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["mutual_information"] for line in lines} == {0.0}


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"question": "?"}], (), r"line 1: got a row with ['question'], expected a text in `pro"),
        ([{"messages": [{"role": "user", "content": "?"}]}], (), "which has no chat template"),
        ([], (), "got no rows in"),
        (PROMPTS, ("--top_p=0.9",), "got --top_p for greedy decoding, expected it with --do_samp"),
    ],
)
def test_what_cannot_be_continued_is_refused(place, capsys, tmp_path, rows, options, message):
    given = write_rows(tmp_path / "given.jsonl", rows)
    arguments = [*asking(place, *options), f"--input={given}"]
    assert message in failed(arguments, capsys)


def test_messages_are_put_in_the_models_own_template(place, capsys, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    tokenizer.chat_template = "<s>{% for m in messages %}{{ m.content }}{% endfor %}"
    shutil.copytree(place / "model", tmp_path / "chatty")
    tokenizer.save_pretrained(tmp_path / "chatty")
    content = PROMPTS[1]["prompt"]
    both = [{"messages": [{"role": "user", "content": content}]}, {"prompt": f"<s>{content}"}]
    given = write_rows(tmp_path / "chat.jsonl", both)
    capsys.readouterr()
    run(*asking(place), f"--input={given}", f"--model={tmp_path / 'chatty'}")
    chat, plain = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert chat["text"] == plain["text"]
    assert chat["messages"] == both[0]["messages"]
