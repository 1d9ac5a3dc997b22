"""Letter and head scoring, and what all scorers share."""

import logging
from dataclasses import replace

import pytest
import torch
from ragged import CLOSE, RAGGED, TASK, adapted, wide_llama, with_ends
from torch.testing import assert_close

from bayestune.data import Question
from bayestune.forward import Draws
from bayestune.scoring import LetterScorer, TextScorer, batches_by_length, make_scorer, row_logits
from promises import Case


@pytest.fixture
def with_bos(byte_level):
    return with_ends(byte_level)


@pytest.fixture
def wide():
    return wide_llama()


@pytest.mark.parametrize("scoring", ["letter", "text"])
def test_labels_are_given_where_all_rows_have_an_answer(byte_level, wide, scoring):
    scorer = make_scorer(wide, byte_level, TASK, scoring)
    assert scorer.collate(scorer.encode(RAGGED))["labels"].tolist() == [1, 0, 3]
    unknown = scorer.encode((RAGGED[0], replace(RAGGED[1], answer=None)))
    assert "labels" not in scorer.collate(unknown)


def test_batches_hold_rows_of_similar_length(byte_level):
    scorer = LetterScorer(byte_level, TASK)
    rows = scorer.encode(RAGGED)
    order = sorted(range(3), key=lambda i: len(rows[i]["ids"]))
    (first, pair), (last, single) = batches_by_length(scorer, rows, 2)
    assert [*first, *last] == order
    for numbers, batch in ((first, pair), (last, single)):
        expected = scorer.collate([rows[i] for i in numbers])
        assert_close(batch, expected)


class OneLostOption:
    """A posterior whose second option overflows to −∞ in one row."""

    def logits(self, batch, draws):
        found = torch.zeros(2, *batch["option_mask"].shape).masked_fill(
            ~batch["option_mask"], -torch.inf
        )
        found[1, 0, 1] = -torch.inf
        return found


def test_an_option_whose_logit_is_minus_infinity_is_not_taken_for_one_that_is_missing(byte_level):
    scorer = LetterScorer(byte_level, TASK)
    rows = scorer.encode(RAGGED)
    with pytest.raises(ValueError, match=r"got logits of −∞ for options of 1 rows; expected num"):
        row_logits(OneLostOption(), scorer, rows, Draws(2))


def test_unknown_scoring(byte_level, wide):
    with pytest.raises(ValueError, match=r"got 'letters', expected one of \('letter', 'text', 'h"):
        make_scorer(wide, byte_level, TASK, "letters")


# The answer's letter


@pytest.mark.parametrize(
    ("scoring", "options"),
    [
        ("letter", {}),
        ("text", {"layout": "packed"}),
        ("text", {"layout": "expanded"}),
        ("head", {}),
    ],
)
def test_a_batch_can_be_pinned_for_a_gpu(scoring, options):
    """Each element has memory of its own; a Trainer pins batches where there is a GPU."""
    case = Case(scoring, **options)
    for name, value in case.scorer.collate(case.scorer.encode(case.task.train)).items():
        assert torch._debug_has_internal_overlap(value) == 0, name


@torch.no_grad()
def test_letter_logits_are_those_of_each_row_alone(with_bos, wide):
    five = Question("e", "red?", tuple("uvwxy"), 0)  # more options than any row of the task
    questions = (*RAGGED, five)
    scorer = make_scorer(wide, with_bos, TASK, "letter")
    rows = scorer.encode(questions)
    logits = scorer(wide, scorer.collate(rows))
    assert logits.shape == (4, 5)
    for row, encoded, got in zip(questions, rows, logits, strict=True):
        alone = wide(torch.tensor([encoded["ids"]])).logits[0, -1]
        count = len(row.options)
        assert_close(got[:count], alone[scorer.tokens[:count]], **CLOSE)
        assert torch.equal(got[count:], torch.full((5 - count,), -torch.inf))


def test_letter_batches_are_padded_left_with_positions_from_zero(byte_level):
    scorer = LetterScorer(byte_level, TASK)
    rows = scorer.encode(RAGGED)
    batch = scorer.collate(rows)
    width = max(len(row["ids"]) for row in rows)
    for i, row in enumerate(rows):
        count = len(row["ids"])
        padding = width - count
        assert batch["input_ids"][i].tolist() == [byte_level.pad_token_id] * padding + row["ids"]
        assert batch["attention_mask"][i].tolist() == [0] * padding + [1] * count
        assert batch["position_ids"][i, padding:].tolist() == list(range(count))


@torch.no_grad()
def shape_at_the_head(model, scorer):
    """What the output layer is given."""
    seen = []
    keep = lambda _, inputs: seen.append(tuple(inputs[0].shape))  # noqa: E731
    handle = model.get_output_embeddings().register_forward_pre_hook(keep)
    scorer(model, scorer.collate(scorer.encode(RAGGED)))
    handle.remove()
    (shape,) = seen
    return shape


@pytest.mark.parametrize("lora", [False, True])
def test_only_the_positions_that_score_reach_the_head(byte_level, wide, lora):
    model = adapted(wide) if lora else wide
    packed = TextScorer(byte_level, TASK, layout="packed")
    rows = packed.encode(RAGGED)
    lengths = [[len(option) for option in row["options"]] for row in rows]
    assert shape_at_the_head(model, LetterScorer(byte_level, TASK)) == (3, 1, 32)
    assert shape_at_the_head(model, packed) == (3, max(map(sum, lengths)) + 1, 32)
    expanded = TextScorer(byte_level, TASK, layout="expanded")
    assert shape_at_the_head(model, expanded) == (12, max(map(max, lengths)) + 1, 32)


# A classification head


@torch.no_grad()
def test_a_head_scores_texts_and_pairs(bert, byte_level, labelled_task):
    model = bert().eval()
    scorer = make_scorer(model, byte_level, labelled_task, "head")
    rows = labelled_task.evaluation
    batch = scorer.collate(scorer.encode(rows))
    assert batch["labels"].tolist() == [row.answer for row in rows]
    for row, got in zip(rows, scorer(model, batch), strict=True):
        texts = (row.context, row.question) if row.context else (row.question,)
        alone = model(**byte_level(*texts, return_tensors="pt")).logits[0]
        assert_close(got, alone, atol=1e-5, rtol=1e-4)


def test_a_head_says_that_long_rows_lost_their_end(bert, byte_level, labelled_task, caplog):
    scorer = make_scorer(bert(), byte_level, labelled_task, "head", max_length=16)
    alone, pair = labelled_task.train[:2]
    long = "red " * 50
    rows = [alone, pair, replace(alone, question=long), replace(pair, context=long)]
    with caplog.at_level(logging.WARNING, "bayestune.scoring"):
        encoded = scorer.encode(rows)
    assert "2 of 4 rows were longer than 16 tokens: the end of their passage, or" in caplog.text
    ids = [row["inputs"]["input_ids"] for row in encoded]
    assert ids[:2] == [
        byte_level(alone.question)["input_ids"],
        byte_level(pair.context, pair.question)["input_ids"],
    ]
    assert [len(row) for row in ids[2:]] == [16, 16]
    question = byte_level(pair.question)["input_ids"]
    assert ids[3][-len(question) :] == question


def test_a_question_too_long_for_any_passage_is_refused(bert, byte_level, labelled_task):
    scorer = make_scorer(bert(), byte_level, labelled_task, "head", max_length=16)
    row = replace(labelled_task.train[1], question="red " * 50)
    with pytest.raises(ValueError, match="row s1: the question takes more than max_length=16"):
        scorer.encode([row])


def test_what_a_head_cannot_score_is_refused(bert, llama, byte_level, labelled_task, tiny_task):
    with pytest.raises(ValueError, match="'letter' does not fit a BertForSequenceClassification"):
        make_scorer(bert(), byte_level, labelled_task, "letter")
    with pytest.raises(ValueError, match="'head' does not fit a LlamaForCausalLM"):
        make_scorer(llama(), byte_level, labelled_task, "head")
    scorer = make_scorer(bert(), byte_level, tiny_task, "head")
    with pytest.raises(ValueError, match="got the options .* expected .* in every row under"):
        scorer.encode(tiny_task.train)
