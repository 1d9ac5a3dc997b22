"""Threads that share a model get the answers that one thread gets."""

import copy
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from bayestune.adapters import Slots, bayesify, drawn, evaluating, exclusive
from bayestune.forward import Draws
from bayestune.posteriors import Dropout, Gaussian, Mixture, Point, TokenNoise, predict
from tiny import BATCH, adapted, converted, end_logits, tiny_llama, with_second


def small_llama() -> nn.Module:
    return tiny_llama(num_hidden_layers=1, hidden_size=16, intermediate_size=16, vocab_size=32)


def in_threads(work: Callable[[int], None], count: int) -> list[BaseException]:
    """Runs the work in threads; what went wrong in them."""
    problems: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return problems


@pytest.fixture
def kinds() -> list[tuple[object, Draws]]:
    """Posteriors on one model, under two adapters, and which draws to ask them for."""
    model = with_second(converted(small_llama(), root_std=0.3, lora_dropout=0.2))
    bayesify(model, init_root_std=0.6, adapter="b")
    first = Gaussian(model, end_logits)
    second = Gaussian(model, end_logits, adapter="b")
    return [
        (first, Draws(4)),
        (first, Draws(3, seed=7)),
        (Gaussian(model, end_logits), Draws(0)),
        (second, Draws(2)),
        (Mixture([Gaussian(model, end_logits), Point(model, end_logits, adapter="b")]), Draws(4)),
        (Dropout(model, end_logits), Draws(2)),
        (TokenNoise(model, end_logits), Draws(2)),
    ]


def test_three_hundred_predictions_of_twelve_threads_are_those_of_one(kinds):
    rows = {"input_ids": BATCH["input_ids"][:, :4]}
    alone = [predict(posterior, rows, draws).probabilities for posterior, draws in kinds]
    weights = kinds[0][0].draw(1)
    done = []

    def work(number: int) -> None:
        for turn in range(25):
            place = (number + turn) % len(kinds)
            posterior, draws = kinds[place]
            found = predict(posterior, rows, draws).probabilities
            assert_close(found, alone[place], rtol=0, atol=1e-6)
            done.append(place)
            if turn % 8 == 0:
                drawn_now = kinds[0][0].draw(1)
                assert all(torch.equal(drawn_now[name], weights[name]) for name in weights)

    assert in_threads(work, 12) == []
    assert len(done) == 300


def test_models_of_their_own_do_not_share_the_seeded_generator():
    """Draws that come from torch's one generator wait for each other, on other models too."""
    posteriors = []
    for _ in range(2):
        posteriors.append(Dropout(adapted(small_llama(), lora_dropout=0.3), end_logits))
    rows = {"input_ids": BATCH["input_ids"][:, :4]}
    expected = posteriors[0].logits(rows, Draws(2))

    def work(number: int) -> None:
        for _ in range(20):
            found = posteriors[number % 2].logits(rows, Draws(2))
            assert_close(found, expected, rtol=0, atol=1e-6)

    assert in_threads(work, 4) == []


@pytest.mark.parametrize("wrapped", ["the model", "its base", "compiled", "drawn", "evaluating"])
def test_all_ways_to_a_model_lead_to_one_lock(wrapped):
    model = converted(small_llama())
    weights = {name: value[None] for name, value in Gaussian(model, end_logits).draw(0).items()}
    contexts = {
        "the model": lambda: exclusive(model),
        "its base": lambda: exclusive(model.get_base_model()),
        "compiled": lambda: exclusive(torch.compile(model, backend="eager")),
        "drawn": lambda: drawn(model, weights),
        "evaluating": lambda: evaluating(model),
    }
    found = []
    with contexts[wrapped](), exclusive(model):  # again, in the same thread
        thread = threading.Thread(target=lambda: found.append(Slots(model).weights()))
        thread.start()
        thread.join(0.05)
        assert found == []
    thread.join()
    assert all(weight.dim() == 2 for weight in found[0].values())


def test_models_that_were_used_can_be_copied_and_pickled():
    model = converted(small_llama())
    expected = predict(Gaussian(model, end_logits), BATCH, 2).probabilities
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(predict(Gaussian(other, end_logits), BATCH, 2).probabilities, expected)
