"""Chats: rows as a model's chat template puts them, and where their answers stand."""

import copy
from dataclasses import asdict, replace

import pytest
import torch

from bayestune import Question, Task, make_scorer
from bayestune.data import Prompt
from bayestune.scoring.tokens import prompt_text
from bayestune.session.as_fitted import prompt_of_fit

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + CHATML
)
TEMPLATE = "Passage: {context}\nQuestion: {question}\nChoices:\n{choices}"
CHAT = Prompt(TEMPLATE, TEMPLATE, chat=True, system="answer by label")
ROW = Question("r", "what is red?", ("green", "blue"), 1, "the sky " * 120, (("user", "hi"),))


@pytest.fixture(params=["byte_level", "sentencepiece"])
def tokenizer(request):
    tokenizer = copy.deepcopy(request.getfixturevalue(request.param))
    tokenizer.chat_template = CHATML
    return tokenizer


def scorer_of(llama, tokenizer, scoring="letter", prompt=CHAT, **more):
    task = Task("t", (ROW,), (ROW,), prompt=prompt)
    return make_scorer(llama(), tokenizer, task, scoring, **more)


def test_a_chat_is_what_the_template_makes_of_it(llama, byte_level, tokenizer):
    text = prompt_text(tokenizer, CHAT, ROW, "letter")
    body = CHAT.render(ROW, "letter")
    head = "<|system|>\nanswer by label</s>\n<|user|>\nhi</s>\n"
    assert text == f"{head}<|user|>\n{body}</s>\n<|assistant|>\n"
    scorer = scorer_of(llama, tokenizer, max_length=400)
    row = scorer.encode_row(ROW)
    assert row["ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert not row["shortened"]


def test_labels_follow_a_chat_without_a_space(llama, byte_level):
    tokenizer = copy.deepcopy(byte_level)
    tokenizer.chat_template = CHATML
    tokens = scorer_of(llama, tokenizer, max_length=400).tokens
    assert tokenizer.convert_ids_to_tokens(tokens[:3]) == ["A", "B", "C"]
    options = scorer_of(llama, tokenizer, "text", max_length=400).encode_row(ROW)["options"]
    assert [tokenizer.decode(ids) for ids in options] == ["green", "blue"]


BY_TOKENS = (
    "{% for m in messages %}<s>{{ m.role }}</s>{{ SPACE + m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant</s>{% endif %}"
)


@pytest.mark.parametrize("space", ["", " "])
def test_an_answer_follows_as_the_template_writes_it(llama, byte_level, space):
    tokenizer = copy.deepcopy(byte_level)
    tokenizer.chat_template = BY_TOKENS.replace("SPACE", repr(space))
    scorer = scorer_of(llama, tokenizer, max_length=400)
    messages = [*CHAT.messages(ROW, "letter"), {"role": "assistant", "content": "A"}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n")
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert [*scorer.encode_row(ROW)["ids"], scorer.tokens[0]] == ids
    options = scorer_of(llama, tokenizer, "text", max_length=400).encode_row(ROW)["options"]
    assert [tokenizer.decode(ids) for ids in options] == [f"{space}green", f"{space}blue"]
    earlier = scorer_of(llama, tokenizer, prompt=replace(CHAT, spaced_by_end=True))
    assert tokenizer.convert_ids_to_tokens(earlier.tokens[:2]) == ["ĠA", "ĠB"]


def test_a_fit_that_does_not_tell_is_asked_as_it_was():
    told = asdict(CHAT)
    assert prompt_of_fit({"task": {"prompt": told}}) == CHAT
    del told["spaced_by_end"]
    assert prompt_of_fit({"task": {"prompt": told}}) == replace(CHAT, spaced_by_end=True)


@pytest.mark.parametrize("scoring", ["letter", "text"])
@pytest.mark.parametrize("max_length", [150, 200])
def test_a_long_passage_is_shortened_and_the_answer_stays_at_the_end(
    llama, tokenizer, scoring, max_length, caplog
):
    whole = scorer_of(llama, tokenizer, scoring, max_length=800)
    scorer = scorer_of(llama, tokenizer, scoring, max_length=max_length)
    full, cut = whole.encode_row(ROW), scorer.encode([ROW])[0]
    assert cut["shortened"]
    assert "their passage was shortened" in caplog.text
    assert max_length - 12 < len(cut["ids"]) <= max_length < len(full["ids"])
    behind = tokenizer.decode(full["ids"]).split("Question:")[1]
    assert tokenizer.decode(cut["ids"]).split("Question:")[1] == behind
    before = tokenizer.decode(cut["ids"]).split("Passage:")[0]
    assert tokenizer.decode(full["ids"]).split("Passage:")[0] == before
    model = llama(initializer_range=0.3)
    short = Question("s", "what is red?", ("green", "blue"), 1, "the sky", ROW.turns)
    batch = scorer.collate(scorer.encode([ROW, short]))
    together = scorer(model, batch)
    for i, row in enumerate((ROW, short)):
        alone = scorer(model, scorer.collate(scorer.encode([row])))
        assert torch.allclose(together[i], alone[0], atol=1e-5)
    with pytest.raises(ValueError, match=r"take more than max_length=30 tokens; raise max_length"):
        scorer_of(llama, tokenizer, scoring, max_length=30).encode([ROW])


def test_letter_logits_are_those_behind_the_generation_prompt(llama, byte_level):
    tokenizer = copy.deepcopy(byte_level)
    tokenizer.chat_template = CHATML
    model = llama(initializer_range=0.3)
    scorer = scorer_of(llama, tokenizer, max_length=400)
    ids = tokenizer(prompt_text(tokenizer, CHAT, ROW, "letter"), return_tensors="pt")["input_ids"]
    found = scorer(model, scorer.collate(scorer.encode([ROW])))
    expected = model(ids).logits[0, -1, tokenizer.convert_tokens_to_ids(["A", "B"])]
    assert torch.allclose(found[0], expected, atol=1e-5)


def test_models_that_take_no_such_chat_are_refused(llama, byte_level):
    with pytest.raises(ValueError, match=r"without a chat template; .*leave out --chat"):
        scorer_of(llama, byte_level)
    tokenizer = copy.deepcopy(byte_level)
    tokenizer.chat_template = NO_SYSTEM
    message = r"does not take messages by \['system', 'user'\] \(no system role\).*--system"
    with pytest.raises(ValueError, match=message):
        scorer_of(llama, tokenizer)
    plain = Prompt(TEMPLATE, TEMPLATE, chat=True)
    assert scorer_of(llama, tokenizer, prompt=plain, max_length=400).encode_row(ROW)["ids"]
