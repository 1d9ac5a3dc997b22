import logging
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from bayestune.adapters import adapted_layers, bayesify, gaussian_layers
from bayestune.data import Prompt, Question, Task
from bayestune.data.prompts import CHOICES, PASSAGE_CHOICES
from bayestune.forward import Draws
from bayestune.posteriors import Gaussian
from bayestune.scoring import LetterScorer, TextScorer, make_scorer
from bayestune.scoring.choose import can_pack
from bayestune.scoring.tokens import answer_tokens

RAGGED = (
    Question("a", "what is red?", ("red", "the blue sky and grass", "green"), 1),
    Question(
        "b", "what is the question for the answer and the passage below?", ("sky", "grass"), 0
    ),
    Question("c", "is sky?", ("green grass", "red", "the", "Return the label"), 3),
)
TASK = Task("ragged", RAGGED, ())
LAYOUTS = ("packed", "expanded")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(params=["byte_level", "sentencepiece"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def fast(backend):
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture
def with_bos(byte_level):
    """Opens a text with <s>, as Llama's does, and closes it with </s>, as some do."""
    backend = Tokenizer.from_str(byte_level.backend_tokenizer.to_str())
    ends = [("<s>", byte_level.bos_token_id), ("</s>", byte_level.eos_token_id)]
    backend.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return fast(backend)


def trained_on_prompts(pre_tokenizer, decoder):
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoder
    special = ["<unk>", "<pad>", "<s>", "</s>"]
    texts = [
        f"Question: is {colour}?\nAnswer: {colour} A B C" for colour in ("red", "green", "blue sky")
    ] * 20
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, special_tokens=special))
    return fast(backend)


def plain(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture
def wide(llama):
    """A model whose random weights are large enough that a wrong position or mask shows."""
    return llama(initializer_range=0.2).eval()


def adapted(model, *, targets=("q_proj", "v_proj", "lm_head")):
    torch.manual_seed(1)
    model = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), task_type="CAUSAL_LM")
    )
    for layer in adapted_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
    return model


# Which token an answer is


@pytest.mark.parametrize("row", RAGGED)
def test_answer_tokens_continue_the_prompt(tokenizer, row):
    prompt, labels = CHOICES.render(row, "letter"), CHOICES.answers(row, "letter")
    tokens = answer_tokens(tokenizer, prompt, labels)
    start = plain(tokenizer, prompt)
    assert [[*start, token] for token in tokens] == [
        plain(tokenizer, f"{prompt} {label}") for label in labels
    ]


def test_answer_tokens_carry_the_space(byte_level, sentencepiece):
    for tokenizer, space in ((byte_level, "Ġ"), (sentencepiece, "▁")):
        tokens = answer_tokens(tokenizer, "red\nAnswer:", ("A", "B"))
        assert tokenizer.convert_ids_to_tokens(tokens) == [f"{space}A", f"{space}B"]


def test_answer_tokens_without_a_space_where_the_tokenizer_splits_it_off():
    isolated = pre_tokenizers.Split(Regex("[A-Za-z]+|."), "isolated")
    tokenizer = trained_on_prompts(isolated, decoders.Fuse())
    assert len(plain(tokenizer, "Answer: A")) == len(plain(tokenizer, "Answer:")) + 2
    assert tokenizer.convert_ids_to_tokens(answer_tokens(tokenizer, "Answer:", ("A", "B"))) == [
        "A",
        "B",
    ]


def test_a_label_of_many_tokens_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r'an answer is not one token .*"?text"?'):
        answer_tokens(tokenizer, "Answer:", ("A", "red grass"))
    task = replace(TASK, prompt=replace(CHOICES, labels=("red grass", "B", "C", "D")))
    with pytest.raises(
        ValueError, match=r'the last tokens are .*use one-token labels or scoring="text"'
    ):
        make_scorer(None, tokenizer, task, "letter")


def test_labels_that_share_a_token_are_refused(sentencepiece):
    assert plain(sentencepiece, "Answer: é")[-1] == plain(sentencepiece, "Answer: è")[-1]
    with pytest.raises(ValueError, match="not one token of its own"):
        answer_tokens(sentencepiece, "Answer:", ("é", "è"))


@pytest.mark.parametrize("part", ["train", "held_out", "evaluation"])
def test_letters_are_found_for_the_widest_row_of_any_part(byte_level, part):
    rows = {
        "train": RAGGED[1:2],
        "held_out": RAGGED[1:2],
        "evaluation": RAGGED[1:2],
        part: RAGGED[2:],
    }
    scorer = LetterScorer(byte_level, Task("t", **rows))
    assert byte_level.convert_ids_to_tokens(scorer.tokens) == ["ĠA", "ĠB", "ĠC", "ĠD"]


# Prompts as tokens


@pytest.mark.parametrize("kind", [LetterScorer, TextScorer])
def test_special_tokens_open_the_prompt_and_nothing_closes_it(with_bos, byte_level, kind):
    scoring = "letter" if kind is LetterScorer else "text"
    for row, encoded in zip(RAGGED, kind(with_bos, TASK).encode(RAGGED), strict=True):
        assert encoded["ids"] == [
            with_bos.bos_token_id,
            *plain(byte_level, CHOICES.render(row, scoring)),
        ]
    unchanged = kind(byte_level, TASK).encode(RAGGED)
    assert [row["ids"] for row in unchanged] == [
        plain(byte_level, CHOICES.render(row, scoring)) for row in RAGGED
    ]


def test_options_are_the_tokens_that_continue_the_prompt(tokenizer):
    for row, encoded in zip(RAGGED, TextScorer(tokenizer, TASK).encode(RAGGED), strict=True):
        whole = [plain(tokenizer, f"{CHOICES.render(row, 'text')} {text}") for text in row.options]
        assert [encoded["ids"] + option for option in encoded["options"]] == whole


def test_an_option_that_the_tokenizer_would_merge_with_the_prompt_stands_on_its_own():
    whole = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer = trained_on_prompts(whole, decoders.Metaspace(prepend_scheme="first"))
    row = Question("1", "is red?", ("red", "green"), 0)
    prompt = plain(tokenizer, CHOICES.render(row, "text"))
    assert plain(tokenizer, f"{CHOICES.render(row, 'text')} red")[: len(prompt)] != prompt
    (encoded,) = TextScorer(tokenizer, Task("t", (row,), ())).encode((row,))
    assert encoded["ids"] == prompt
    assert [tokenizer.decode(ids).strip() for ids in encoded["options"]] == ["red", "green"]


@pytest.mark.parametrize("scoring", ["letter", "text"])
def test_labels_are_given_where_all_rows_have_an_answer(byte_level, wide, scoring):
    scorer = make_scorer(wide, byte_level, TASK, scoring)
    assert scorer.collate(scorer.encode(RAGGED))["labels"].tolist() == [1, 0, 3]
    assert "labels" not in scorer.collate(
        scorer.encode((RAGGED[0], replace(RAGGED[1], answer=None)))
    )


# Letter scoring


def test_letter_logits_are_those_of_each_row_alone(with_bos, wide):
    scorer = make_scorer(wide, with_bos, TASK, "letter")
    rows = scorer.encode(RAGGED)
    with torch.no_grad():
        logits = scorer(wide, scorer.collate(rows))
        assert logits.shape == (3, 4)
        for row, encoded, got in zip(RAGGED, rows, logits, strict=True):
            alone = wide(torch.tensor([encoded["ids"]])).logits[0, -1]
            count = len(row.options)
            assert_close(got[:count], alone[scorer.tokens[:count]], **CLOSE)
            assert torch.equal(got[count:], torch.full((4 - count,), -torch.inf))


def test_letter_batches_are_padded_left_with_positions_from_zero(byte_level):
    scorer = LetterScorer(byte_level, TASK)
    rows = scorer.encode(RAGGED)
    batch = scorer.collate(rows)
    for i, row in enumerate(rows):
        padding = batch["input_ids"].shape[1] - len(row["ids"])
        assert batch["input_ids"][i].tolist() == [byte_level.pad_token_id] * padding + row["ids"]
        assert batch["attention_mask"][i].tolist() == [0] * padding + [1] * len(row["ids"])
        assert batch["position_ids"][i, padding:].tolist() == list(range(len(row["ids"])))
    assert (batch["attention_mask"][:, 0] == 0).any()


def head_inputs(model, scorer, rows):
    seen = []
    handle = model.get_output_embeddings().register_forward_hook(
        lambda _, inputs, __: seen.append(inputs[0].shape)
    )
    with torch.no_grad():
        scorer(model, scorer.collate(rows))
    handle.remove()
    return seen


@pytest.mark.parametrize("lora", [False, True])
def test_only_the_positions_that_score_reach_the_head(byte_level, wide, lora):
    model = adapted(wide) if lora else wide
    letter = make_scorer(wide, byte_level, TASK, "letter")
    assert head_inputs(model, letter, letter.encode(RAGGED)) == [(3, 1, 32)]
    packed, expanded = (TextScorer(byte_level, TASK, layout=layout) for layout in LAYOUTS)
    rows = packed.encode(RAGGED)
    block = max(sum(map(len, row["options"])) for row in rows)
    assert head_inputs(model, packed, rows) == [(3, block + 1, 32)]
    longest = max(len(option) for row in rows for option in row["options"])
    assert head_inputs(model, expanded, rows) == [(12, longest + 1, 32)]


# Text scoring


def naive_logits(model, rows):
    """One forward pass without padding for each option: the mean log-likelihood of its tokens."""

    def score(ids, option):
        logits = model(torch.tensor([ids + option])).logits[0, len(ids) - 1 : -1]
        return sum(logits[i].log_softmax(-1)[token] for i, token in enumerate(option)) / len(option)

    width = max(len(row["options"]) for row in rows)
    missing = torch.tensor(-torch.inf)
    scores = [[score(row["ids"], option) for option in row["options"]] for row in rows]
    return torch.stack([torch.stack(row + [missing] * (width - len(row))) for row in scores])


def logits_and_gradients(model, logits):
    model.zero_grad()
    F.cross_entropy(logits, torch.tensor([row.answer for row in RAGGED])).backward()
    return logits.detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_and_expanded_equal_the_naive_likelihood(with_bos, wide, attention):
    wide.set_attn_implementation(attention)
    model = adapted(wide)
    scorers = [make_scorer(wide, with_bos, TASK, "text", layout=layout) for layout in LAYOUTS]
    assert [scorer.layout for scorer in scorers] == list(LAYOUTS)
    rows = scorers[0].encode(RAGGED)
    expected, gradients = logits_and_gradients(model, naive_logits(model, rows))
    assert len(gradients) == 10
    assert min(g.abs().max() for g in gradients.values()) > 1e-3
    for scorer in scorers:
        logits, mine = logits_and_gradients(
            model, scorer(model, scorer.collate(scorer.encode(RAGGED)))
        )
        assert_close(logits, expected, **CLOSE)
        assert_close(mine, gradients, **CLOSE)


def test_the_layout_is_packed_where_the_model_can(byte_level, wide):
    assert can_pack(wide)
    assert make_scorer(wide, byte_level, TASK, "text").layout == "packed"
    assert make_scorer(adapted(wide).get_base_model(), byte_level, TASK, "text").layout == "packed"
    wide.config._attn_implementation = "flash_attention_2"
    assert not can_pack(wide)


def mistral(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2}
    return MistralForCausalLM(MistralConfig(**sizes, **heads, **changes)).eval()


def test_a_sliding_window_is_not_packed(byte_level):
    assert can_pack(mistral(sliding_window=None))
    model = mistral(sliding_window=4)
    assert not can_pack(model)
    scorer = make_scorer(model, byte_level, TASK, "text")
    assert scorer.layout == "expanded"
    rows = scorer.encode(RAGGED)
    packed = TextScorer(byte_level, TASK, layout="packed")
    with torch.no_grad():
        expected = naive_logits(model, rows)
        assert_close(scorer(model, scorer.collate(rows)), expected, **CLOSE)
        assert not torch.allclose(packed(model, packed.collate(rows)), expected, atol=1e-2)


SMALL = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 1, "initializer_range": 0.2}


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (MambaForCausalLM, MambaConfig(**SMALL, state_size=4)),
        (BloomForCausalLM, BloomConfig(**SMALL, n_head=2)),
        (FalconForCausalLM, FalconConfig(**SMALL, num_attention_heads=2, alibi=True)),
    ],
)
def test_a_model_that_goes_by_a_token_s_place_is_not_packed(byte_level, kind, config):
    torch.manual_seed(0)
    model = kind(config).eval()
    assert not can_pack(model)
    scorer = make_scorer(model, byte_level, TASK, "text")
    with torch.no_grad():
        rows = scorer.encode(RAGGED)
        assert_close(
            scorer(model, scorer.collate(rows)), naive_logits(model, rows), rtol=1e-4, atol=1e-4
        )


def test_a_model_with_recurrent_layers_is_not_packed(wide):
    wide._is_stateful = True
    assert not can_pack(wide)


# Draws: all options of a question are one row


SAME = tuple(Question(str(i), "what is red?", ("the sky",) * 3, i) for i in range(2))


@pytest.fixture
def random_slots(wide):
    """A Gaussian model, and what came out of each A in the last forward pass."""
    model = adapted(wide, targets=("q_proj", "v_proj"))
    bayesify(model, init_root_std=1.0)
    outputs = {}
    for path, layer in adapted_layers(model).items():
        keep = lambda _, inputs, path=path: outputs.__setitem__(path, inputs[0].detach())  # noqa: E731
        layer.lora_B["default"].register_forward_pre_hook(keep)
    return model, outputs


def same(values):
    return all(torch.allclose(value, values[0], atol=1e-5) for value in values)


@pytest.mark.parametrize("noise", ["row", "independent"])
def test_training_noise_is_one_draw_a_question(byte_level, random_slots, noise):
    model, outputs = random_slots
    for layer in gaussian_layers(model).values():
        layer.noise = noise
    scorer = TextScorer(byte_level, Task("same", SAME, ()), layout="expanded")
    logits = scorer(model.train(), scorer.collate(scorer.encode(SAME)))
    assert len(outputs) == 4
    for output in outputs.values():
        assert output.shape[0] == 6
        assert same(output[:3])
        assert same(output[3:])
        assert not torch.allclose(output[0], output[3], atol=0.1)
    assert same(logits.T)
    assert (logits[0] - logits[1]).abs().min() > 1e-3


def test_training_noise_under_the_packed_layout(byte_level, random_slots):
    model, outputs = random_slots
    scorer = TextScorer(byte_level, Task("same", SAME, ()), layout="packed")
    logits = scorer(model.train(), scorer.collate(scorer.encode(SAME)))
    assert same(logits.T)
    assert (logits[0] - logits[1]).abs().min() > 1e-3
    assert not any(torch.allclose(output[0], output[1], atol=0.1) for output in outputs.values())


@pytest.mark.parametrize("noise", ["row", "independent"])
def test_a_noisy_training_step_is_the_same_in_both_layouts(with_bos, wide, noise):
    model = adapted(wide, targets=("q_proj", "v_proj"))
    bayesify(model, init_root_std=0.3, noise=noise)
    found = {}
    for layout in LAYOUTS:
        scorer = make_scorer(wide, with_bos, TASK, "text", layout=layout)
        torch.manual_seed(3)
        found[layout] = logits_and_gradients(
            model.train(), scorer(model, scorer.collate(scorer.encode(RAGGED)))
        )
    (logits, gradients), (others, same_gradients) = found.values()
    assert_close(logits, others, **CLOSE)
    assert_close(gradients, same_gradients, **CLOSE)
    assert min(g.abs().max() for name, g in gradients.items() if "root_std" in name) > 1e-4
    torch.manual_seed(4)
    assert not torch.allclose(
        scorer(model, scorer.collate(scorer.encode(RAGGED))), logits, atol=1e-2
    )


def test_training_noise_is_per_row_again_after_a_grouped_batch(byte_level, random_slots):
    model, _ = random_slots
    (groups,) = {
        id(layer.groups): layer.groups for layer in gaussian_layers(model).values()
    }.values()
    letter = LetterScorer(byte_level, TASK)
    for layout, size in (("expanded", 4), ("packed", 1)):
        text = TextScorer(byte_level, TASK, layout=layout)
        text(model.train(), text.collate(text.encode(RAGGED)))
        assert groups.size == size
    groups.size = 4
    letter(model, letter.collate(letter.encode(RAGGED)))
    assert groups.size == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_held_draw_is_one_function_of_all_options_and_questions(byte_level, random_slots, layout):
    model, outputs = random_slots
    scorer = TextScorer(byte_level, Task("same", SAME, ()), layout=layout)
    batch = scorer.collate(scorer.encode(SAME))
    logits = Gaussian(model, scorer).logits(batch, Draws(2))
    for output in outputs.values():
        first, second = output.chunk(2)
        assert same(first)
        assert same(second)
        assert not torch.allclose(first[0], second[0], atol=0.1)
    assert same(logits.flatten(1).T)
    assert (logits[0] - logits[1]).abs().min() > 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_held_draws_of_ragged_rows_equal_plain_adapters(byte_level, random_slots, layout):
    model, _ = random_slots
    scorer = TextScorer(byte_level, TASK, layout=layout)
    rows = scorer.encode(RAGGED)
    posterior = Gaussian(model, scorer)
    logits = posterior.logits(scorer.collate(rows), Draws(3, seed=5))
    draws = [posterior.draw(index, seed=5) for index in range(3)]
    model.eval()
    for draw, got in zip(draws, logits, strict=True):
        with torch.no_grad():
            for path, layer in gaussian_layers(model).items():
                layer.weight.copy_(draw[path])
            assert_close(got, naive_logits(model, rows), rtol=1e-4, atol=1e-4)


# Length


LONG = " ".join(["the sky and the grass"] * 60)


def long_task(context=LONG):
    return Task(
        "long", (Question("p", "what is red?", ("the sky", "red grass below"), 0, context),), ()
    )


@pytest.mark.parametrize("scoring", ["letter", "text"])
def test_a_long_passage_is_shortened_and_nothing_else(with_bos, wide, scoring, caplog):
    task = replace(long_task(), prompt=PASSAGE_CHOICES)
    (row,) = task.train
    short = replace(row, id="q", context="the sky")
    scorer = make_scorer(wide, with_bos, task, scoring, max_length=90)
    with caplog.at_level(logging.WARNING, "bayestune.scoring.tokens"):
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


def test_the_whole_passage_may_go_but_not_a_token_of_the_question(byte_level):
    task = replace(long_task("zzz"), prompt=PASSAGE_CHOICES)
    bare = PASSAGE_CHOICES.render(replace(task.train[0], context=""), "letter")
    least = len(plain(byte_level, bare))
    (encoded,) = LetterScorer(byte_level, task, max_length=least).encode(task.train)
    assert byte_level.decode(encoded["ids"]) == bare
    with pytest.raises(
        ValueError,
        match=rf"row p: the question .* than max_length={least - 1} tokens; raise max_length",
    ):
        LetterScorer(byte_level, task, max_length=least - 1).encode(task.train)


def test_a_long_question_is_refused(byte_level):
    with pytest.raises(
        ValueError, match="row b: the question and its options take more than max_length=20 tokens"
    ):
        TextScorer(byte_level, TASK, max_length=20).encode(RAGGED[1:])


def test_a_cut_through_a_character_leaves_no_part_of_it(byte_level):
    task = replace(long_task("é" * 200), prompt=PASSAGE_CHOICES)
    for length in (80, 81, 82, 83):
        (encoded,) = LetterScorer(byte_level, task, max_length=length).encode(task.train)
        text = byte_level.decode(encoded["ids"])
        assert "\ufffd" not in text
        assert "éé\nQuestion: " in text


def test_a_passage_with_odd_spaces_is_kept_as_it_is(byte_level):
    context = "the sky , is n't  red .\n" * 20
    task = replace(long_task(context), prompt=PASSAGE_CHOICES)
    cleaning = fast(byte_level.backend_tokenizer)
    cleaning.clean_up_tokenization_spaces = True
    cleaning.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    (encoded,) = LetterScorer(cleaning, task, max_length=90).encode(task.train)
    text = byte_level.decode(encoded["ids"], clean_up_tokenization_spaces=False)
    assert context.startswith(text.partition("Passage: ")[2].partition("\nQuestion: ")[0])


def test_unknown_scoring(byte_level, wide):
    with pytest.raises(
        ValueError,
        match=r"unknown scoring: got 'letters', expected one of \('letter', 'text', 'head'\)",
    ):
        make_scorer(wide, byte_level, TASK, "letters")


def test_a_prompt_of_ones_own(byte_level, wide):
    prompt = Prompt("{question}{choices} Answer:", "{question}", labels=("A", "B", "C", "D"))
    scorer = make_scorer(wide, byte_level, replace(TASK, prompt=prompt), "letter")
    assert byte_level.convert_ids_to_tokens(scorer.tokens) == ["ĠA", "ĠB", "ĠC", "ĠD"]


# A classification head


def test_a_head_scores_texts_and_pairs(bert, byte_level, labelled_task):
    model = bert().eval()
    scorer = make_scorer(model, byte_level, labelled_task, "head")
    rows = labelled_task.evaluation
    with torch.no_grad():
        logits = scorer(model, scorer.collate(scorer.encode(rows)))
        for row, expected in zip(rows, logits, strict=True):
            texts = (row.context, row.question) if row.context else (row.question,)
            alone = model(**byte_level(*texts, return_tensors="pt")).logits[0]
            torch.testing.assert_close(alone, expected, atol=1e-5, rtol=1e-4)
    assert scorer.collate(scorer.encode(rows))["labels"].tolist() == [row.answer for row in rows]


def test_a_long_pair_loses_the_end_of_its_context(bert, byte_level, labelled_task):
    scorer = make_scorer(bert(), byte_level, labelled_task, "head", max_length=16)
    row = replace(labelled_task.train[1], context="red " * 50)
    (encoded,) = scorer.encode([row])
    question = byte_level(row.question)["input_ids"]
    assert encoded["length"] == 16
    assert encoded["inputs"]["input_ids"][-len(question) :] == question


def test_what_a_head_cannot_score_is_refused(bert, llama, byte_level, labelled_task, tiny_task):
    with pytest.raises(
        ValueError, match="scoring 'letter' does not fit a BertForSequenceClassification"
    ):
        make_scorer(bert(), byte_level, labelled_task, "letter")
    with pytest.raises(ValueError, match="scoring 'head' does not fit a LlamaForCausalLM"):
        make_scorer(llama(), byte_level, labelled_task, "head")
    scorer = make_scorer(bert(), byte_level, tiny_task, "head")
    with pytest.raises(ValueError, match="got the options .* expected .* in every row under"):
        scorer.encode(tiny_task.train)
