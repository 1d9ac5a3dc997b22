"""Which tokens a prompt, a label and an option become, and what a limit on their number does."""

import logging
from dataclasses import replace

import pytest
from ragged import RAGGED, TASK, fast, plain, with_ends
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from bayestune.data import Prompt, Question, Task
from bayestune.data.prompts import CHOICES, PASSAGE_CHOICES
from bayestune.scoring import LetterScorer, TextScorer, make_scorer

KINDS = {"letter": LetterScorer, "text": TextScorer}


@pytest.fixture
def with_bos(byte_level):
    return with_ends(byte_level)


@pytest.fixture(params=["byte_level", "sentencepiece"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def trained(pre_tokenizer, decoder):
    """A tokenizer that splits texts and puts them together in this way."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoder
    special = ["<unk>", "<pad>", "<s>", "</s>"]
    colours = ("red", "green", "blue sky")
    texts = [f"Question: is {name}?\nAnswer: {name} A B C" for name in colours] * 20
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special)
    backend.train_from_iterator(texts, trainer)
    return fast(backend, unk_token="<unk>")


# Labels


def tokens_of(tokenizer, rows, prompt=CHOICES):
    return LetterScorer(tokenizer, Task("t", tuple(rows), (), prompt=prompt)).tokens


@pytest.mark.parametrize("prompt", [CHOICES, Prompt("{question}{choices} Answer:", "")])
def test_labels_are_the_tokens_that_continue_each_prompt(tokenizer, prompt):
    tokens = tokens_of(tokenizer, RAGGED, prompt)
    assert tokenizer.convert_ids_to_tokens(tokens)[0] in ("ĠA", "▁A")
    for row in RAGGED:
        text = prompt.render(row, "letter")
        for token, label in zip(tokens, prompt.answers(row, "letter"), strict=False):
            assert [*plain(tokenizer, text), token] == plain(tokenizer, f"{text} {label}")


def test_labels_have_no_space_where_the_tokenizer_splits_it_off():
    isolated = pre_tokenizers.Split(Regex("[A-Za-z]+|."), "isolated")
    tokenizer = trained(isolated, decoders.Fuse())
    tokens = tokens_of(tokenizer, RAGGED[:1])
    assert tokenizer.convert_ids_to_tokens(tokens) == ["A", "B", "C"]


def test_labels_do_not_depend_on_the_rows(tokenizer):
    odd = Question("odd", "Answer", tuple("é!1?"), 0, context="Answer: B")
    alone = [tokens_of(tokenizer, rows) for rows in ([], RAGGED[1:2], RAGGED, [odd])]
    assert alone == [alone[0]] * 4
    assert len(alone[0]) >= 4


@pytest.mark.parametrize("part", ["train", "held_out", "evaluation"])
@pytest.mark.parametrize(
    ("labels", "wrong", "last"),
    [
        (("A", "red grass"), "red grass", "grass"),
        (("red grass", "A"), "red grass", "grass"),
        (("A", "A"), "A", "A"),
        (("A", "é"), "é", "<unk>"),
        (("é", "A"), "é", "<unk>"),
    ],
)
def test_a_label_without_a_known_token_of_its_own_is_refused(
    sentencepiece, part, labels, wrong, last
):
    rows = {"train": (), "evaluation": (), part: RAGGED[1:2]}
    task = Task("t", **rows, prompt=replace(CHOICES, labels=labels))
    with pytest.raises(
        ValueError, match=rf"label '{wrong}' is not a token .*{last}.*expected one that is known"
    ):
        make_scorer(None, sentencepiece, task, "letter").encode(task.evaluation)


def test_only_labels_that_a_row_needs_must_have_a_token(byte_level):
    scorer = LetterScorer(byte_level, TASK)
    assert byte_level.convert_ids_to_tokens(scorer.tokens) == [f"Ġ{label}" for label in "ABCDE"]
    six = Question("six", "?", tuple("uvwxyz"), 0)
    with pytest.raises(ValueError, match="label 'F' is not a token .* use one-token labels or"):
        scorer.encode([six])


# Prompts and options


@pytest.mark.parametrize("scoring", KINDS)
def test_special_tokens_open_the_prompt_and_nothing_closes_it(with_bos, byte_level, scoring):
    prompts = [plain(byte_level, CHOICES.render(row, scoring)) for row in RAGGED]
    bare = KINDS[scoring](byte_level, TASK).encode(RAGGED)
    opened = KINDS[scoring](with_bos, TASK).encode(RAGGED)
    assert [row["ids"] for row in bare] == prompts
    assert [row["ids"] for row in opened] == [[with_bos.bos_token_id, *ids] for ids in prompts]


def test_options_are_the_tokens_that_continue_the_prompt(tokenizer):
    for row, encoded in zip(RAGGED, TextScorer(tokenizer, TASK).encode(RAGGED), strict=True):
        prompt = CHOICES.render(row, "text")
        whole = [plain(tokenizer, f"{prompt} {text}") for text in row.options]
        assert [encoded["ids"] + option for option in encoded["options"]] == whole


def test_an_option_that_would_merge_with_the_prompt_stands_on_its_own():
    whole = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer = trained(whole, decoders.Metaspace(prepend_scheme="first"))
    row = Question("1", "is red?", ("red", "green"), 0)
    prompt = CHOICES.render(row, "text")
    ids = plain(tokenizer, prompt)
    assert plain(tokenizer, f"{prompt} red")[: len(ids)] != ids
    (encoded,) = TextScorer(tokenizer, Task("t", (row,), ())).encode((row,))
    assert encoded["ids"] == ids
    assert [tokenizer.decode(ids).strip() for ids in encoded["options"]] == ["red", "green"]


# Length


LONG = " ".join(["the sky and the grass"] * 60)


def long_task(context=LONG):
    row = Question("p", "what is red?", ("the sky", "red grass below"), 0, context)
    return Task("long", (row,), (), prompt=PASSAGE_CHOICES)


@pytest.mark.parametrize("scoring", KINDS)
def test_a_long_passage_is_shortened_and_nothing_else(with_bos, scoring, caplog):
    task = long_task()
    (row,) = task.train
    short = replace(row, id="q", context="the sky")
    scorer = KINDS[scoring](with_bos, task, max_length=90)
    with caplog.at_level(logging.WARNING, "bayestune.scoring"):
        encoded, untouched = scorer.encode((row, short))
    assert "1 of 2 rows were longer than 90 tokens: their passage was shortened" in caplog.text
    text = with_bos.decode(encoded["ids"])
    head, tail = PASSAGE_CHOICES.render(replace(row, context="|"), scoring).split("|")
    assert text.startswith(f"<s>{head}")
    assert text.endswith(tail)
    kept = text.removeprefix(f"<s>{head}").removesuffix(tail)
    assert LONG.startswith(kept)
    assert len(kept) > 20
    longest = max(map(len, encoded["options"])) if scoring == "text" else 0
    assert 87 <= len(encoded["ids"]) + longest <= 90
    assert with_bos.decode(untouched["ids"]) == f"<s>{PASSAGE_CHOICES.render(short, scoring)}"


def test_nothing_is_said_where_nothing_is_shortened(byte_level, caplog):
    LetterScorer(byte_level, TASK).encode(RAGGED)
    assert caplog.text == ""


@pytest.mark.parametrize("kind", [LetterScorer, TextScorer])
def test_the_whole_passage_may_go_but_not_a_token_of_the_question(byte_level, kind):
    task = long_task("zzz")
    (whole,) = kind(byte_level, long_task("")).encode(long_task("").train)
    least = len(whole["ids"])
    if kind is TextScorer:
        least += max(map(len, whole["options"]))
    (encoded,) = kind(byte_level, task, max_length=least).encode(task.train)
    assert encoded["ids"] == whole["ids"]
    with pytest.raises(
        ValueError, match=rf"row p: the question .* max_length={least - 1} tokens; raise max_length"
    ):
        kind(byte_level, task, max_length=least - 1).encode(task.train)


@pytest.mark.parametrize("length", [80, 81, 82, 83])
def test_a_cut_through_a_character_leaves_no_part_of_it(byte_level, length):
    task = long_task("é" * 200)
    (encoded,) = LetterScorer(byte_level, task, max_length=length).encode(task.train)
    assert "éé\nQuestion: " in byte_level.decode(encoded["ids"])


def test_a_passage_with_odd_spaces_is_kept_as_it_is(byte_level):
    context = "the sky , is n't  red .\n" * 20
    option = "clean_up_tokenization_spaces"
    forced = f"{option}_for_bpe_even_though_it_will_corrupt_output"
    cleaning = fast(byte_level.backend_tokenizer, **{option: True, forced: True})
    task = long_task(context)
    (encoded,) = LetterScorer(cleaning, task, max_length=90).encode(task.train)
    text = byte_level.decode(encoded["ids"], **{option: False})
    assert context.startswith(text.partition("Passage: ")[2].partition("\nQuestion: ")[0])
