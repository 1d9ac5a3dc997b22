"""One log-likelihood for an option of several draws, and a harness's documents as rows."""

import math

import pytest
import torch
from torch.testing import assert_close

from bayestune.evaluation import averaged_options, averaged_texts, option_rows

DRAWN = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).double() * 3 - 40


def test_the_softmax_over_options_is_the_average_of_the_draws():
    found = averaged_options(DRAWN)
    assert_close(found.softmax(-1), DRAWN.softmax(-1).mean(0))
    assert found.argmax() == DRAWN.softmax(-1).mean(0).argmax()


def test_options_keep_the_scale_of_likelihoods():
    total = averaged_options(DRAWN).exp().sum()
    assert_close(total, DRAWN.exp().sum(-1).mean())


def test_draws_count_alike_however_probable_they_find_all_options():
    """A draw that finds every option a million times likelier says no more than the others."""
    drawn = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]]).double().log()
    moved = drawn + torch.tensor([[14.0], [0.0], [-3.0]])
    expected = torch.tensor([1.4 / 3, 1.6 / 3]).double()
    for values in (drawn, moved):
        assert_close(averaged_options(values).softmax(-1), expected)


def test_one_draw_keeps_its_own_numbers_bit_for_bit():
    assert torch.equal(averaged_options(DRAWN[:1]), DRAWN[0])
    assert_close(averaged_options(DRAWN[[0, 0, 0]]), DRAWN[0])


def test_a_temperature_changes_probabilities_and_not_the_scale():
    found = averaged_options(DRAWN, 2.5)
    assert_close(found.softmax(-1), (DRAWN / 2.5).softmax(-1).mean(0))
    assert_close(found.exp().sum(), DRAWN.exp().sum(-1).mean())
    alone = averaged_options(DRAWN[:1], 2.5)
    assert_close(alone.softmax(-1), (DRAWN[0] / 2.5).softmax(-1))


def test_a_text_has_the_likelihood_of_the_mixture():
    found = averaged_texts(torch.tensor([-900.0, -901.0]).double())
    assert found.item() == pytest.approx(-900 + math.log((1 + math.exp(-1)) / 2))


# Documents as rows


class Colours:
    """A task of the harness, as far as rows need one."""

    multiple_input = False

    def doc_to_choice(self, doc):
        return doc["options"]

    def doc_to_text(self, doc):
        return doc["q"]


def sample(number, target, options=("red", "blauäugig"), q="what?"):
    return {"doc_id": number, "doc": {"options": list(options), "q": q}, "target": target}


def drawn_of(*numbers, options=2):
    return {number: torch.arange(2.0 * options).reshape(2, options) for number in numbers}


def test_targets_are_indices_texts_or_lists_of_one():
    samples = [sample(0, 1), sample(3, "blauäugig"), sample(4, [1]), sample(5, 0)]
    rows = option_rows(Colours(), [*samples, samples[0]], drawn_of(0, 3, 4, 5))
    assert [row.answer for row in rows.questions] == [1, 1, 1, 0]
    assert [row.id for row in rows.questions] == ["0", "3", "4", "5"]
    assert rows.questions[0].question == "what?"


@pytest.mark.parametrize(
    ("target", "got"), [([0, 1], "[0, 1]"), (-100, "-100"), ("green", "None"), (True, "True")]
)
def test_rows_without_one_right_answer_are_left_out_and_told(target, got):
    rows = option_rows(Colours(), [sample(0, target), sample(1, 1)], drawn_of(0, 1))
    assert [row.id for row in rows.questions] == ["1"]
    (said,) = rows.left_out
    assert said == f"row 0: got the target {got}; expected one of its 2 options"


def test_requests_that_are_not_one_for_each_option_are_left_out():
    rows = option_rows(Colours(), [sample(0, 1)], drawn_of(0, options=3))
    assert rows.left_out == ("row 0: got 3 requests for 2 options; expected one each",)


def test_options_that_are_contexts_have_their_answer_in_the_text():
    task = Colours()
    task.multiple_input = True
    rows = option_rows(task, [sample(0, " the end", q=1)], drawn_of(0))
    assert rows.questions[0].answer == 1
    assert rows.questions[0].question == "red | blauäugig"


def test_readings_divide_by_characters_and_bytes():
    rows = option_rows(
        Colours(),
        [sample(0, 1), sample(1, 0, ("a", "b", "cc"))],
        {
            0: torch.tensor([[3.0, 9.0], [6.0, 18.0]]),
            1: torch.tensor([[1.0, 2.0, 4.0], [2.0, 4.0, 8.0]]),
        },
    )
    assert rows.logits("acc").shape == (2, 2, 3)
    assert rows.logits("acc")[1, 0].tolist() == [6, 18, -math.inf]
    assert rows.logits("acc_norm")[0].tolist() == [[1, 1, -math.inf], [1, 2, 2]]
    assert rows.logits("acc_bytes")[1, 0, :2].tolist() == pytest.approx([2, 1.8])
