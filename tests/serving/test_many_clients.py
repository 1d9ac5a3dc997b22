"""Many clients at once: unlike rows, draws, cascades and posteriors in one queue."""

import itertools
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from clients import held, serving, wait_for, with_band

from bayestune.data import Question
from bayestune.scoring import TextScorer
from bayestune.serving import ArtefactStore, Limits
from bayestune.serving.waiting import Waiting, Worker
from running import fitting, read_rows, run, write_rows

CLIENTS = 16
ROWS = 20  # of each way of asking
WORDS = ("red", "green", "blue", "sky", "sea", "stone", "leaf", "ash")
# How each model is asked, by how `predict` is: calibrated, or with so many draws of a seed.
ASKED = {
    "blob": [{}, {"draws": 0}, {"draws": 10}, {"draws": 2, "seed": 5}],
    "mle": [{}],
    "cascade": [{}],
    "text": [{}, {"draws": 0}],
}


def unlike_rows(most):
    """Rows of 2 to so many options whose questions have 1 to 40 words."""
    rows = []
    for i in range(ROWS):
        options = [f"{WORDS[k % 8]} {k}" for k in range(2 + 3 * i % (most - 1))]
        rows.append({"question": f"{i} {'a ' * (1 + 7 * i % 40)}?", "options": options})
    return rows


@pytest.fixture(scope="module")
def asked(place, tmp_path_factory):
    """The folders, and each body with the line of `predict` for it."""
    folder = tmp_path_factory.mktemp("load")
    shutil.copytree(place / "blob", folder / "cascade")
    with_band(folder / "cascade", [0.3, 0.6])
    run(*fitting(place, output=folder / "text", method="blob", scoring="text"))
    places = {name: folder / name for name in ASKED}
    places |= {name: place / name for name in ("blob", "mle")}
    pairs = []
    for name, ways in ASKED.items():
        rows = unlike_rows(12 if name == "text" else 5)  # as many as the tokenizer has letters
        file = write_rows(folder / f"{name}.jsonl", rows)
        for way in ways:
            said = folder / f"said-{len(pairs)}.jsonl"
            given = [f"--posterior={places[name]}", f"--input={file}", f"--output={said}"]
            run("predict", *given, *told_to_predict(way))
            for row, line in zip(rows, read_rows(said), strict=True):
                assert "error" not in line
                pairs.append(({**row, **way, "model": name}, line))
    return list(places.values()), pairs


def told_to_predict(way):
    """The options of `predict` for a way of asking the service."""
    names = {"draws": "draws", "seed": "draw_seed"}
    told = [f"--{names[key]}={value}" for key, value in way.items()]
    return [*told, "--uncalibrated"] if way else []


def by_turns(pairs):
    """The pairs, models and ways by turns."""
    return [pair for row in range(ROWS) for pair in pairs[row::ROWS]]


def agrees(found, line):
    assert found["probabilities"] == pytest.approx(line["probabilities"], abs=1e-5)
    assert found["choice"] == line["choice"]
    assert found["decision"] == line.get("decision")


def test_no_answer_is_lost_and_all_are_those_of_predict(asked):
    folders, pairs = asked
    with serving(folders) as client, ThreadPoolExecutor(CLIENTS) as pool:
        bodies = [body for body, _ in by_turns(pairs)]
        replies = list(pool.map(lambda body: client.post("/v1/decisions", json=body), bodies))
        assert [reply.text for reply in replies if reply.status_code != 200] == []
        for reply, (_, line) in zip(replies, by_turns(pairs), strict=True):
            agrees(reply.json(), line)
        assert client.get("/readyz").json() == {
            "status": "ready",
            "waiting": 0,
            "models": ["blob", "mle", "cascade", "text"],
        }


def test_clients_that_are_turned_away_and_ask_again_are_all_answered(asked):
    folders, pairs = asked
    turned = []

    def patient(client, body):
        while True:
            reply = client.post("/v1/decisions", json=body)
            if reply.status_code != 429:
                return reply
            turned.append(reply.headers["retry-after"])

    with serving(folders, Limits(max_waiting=3)) as client, ThreadPoolExecutor(CLIENTS) as pool:
        with held(client) as release:
            waits = [pool.submit(patient, client, body) for body, _ in by_turns(pairs)]
            wait_for(lambda: len(turned) > CLIENTS)
            release.set()
        for wait, (_, line) in zip(waits, by_turns(pairs), strict=True):
            agrees(wait.result().json(), line)
    assert set(turned) == {"1"}


def test_rows_that_nobody_waits_for_make_room(place, new):
    limits = Limits(max_waiting=3, request_seconds=0.3)
    with serving([place / "blob"], limits) as client:
        with held(client) as release:
            for _ in range(3):
                reply = client.post("/v1/decisions", json={"rows": new[:3]})
                assert reply.status_code == 504
            release.set()
        client.app.state.handler.limits.__dict__["request_seconds"] = 20.0
        assert client.post("/v1/decisions", json=new[0]).status_code == 200
        figures = client.get("/metrics").text.splitlines()
    assert "bayestune_pass_rows_sum 1.0" in figures  # the model read none of the others


def passes_over(predictor, rows, limits=None):
    """The numbers of the rows of each pass over rows that wait together, and its tokens."""
    items = []
    for row in rows:
        (encoded,) = predictor.session.scorer.encode([row])
        items.append(Waiting(predictor, row, encoded))
    done = []

    def see(_, asked, outputs, tokens):
        before = set(itertools.chain.from_iterable(numbers for numbers, _ in done))
        numbers = {int(row.id) for row in asked}
        assert outputs.logits.shape[1] == len(numbers) == len(asked)
        assert not numbers & before
        assert not any(items[number].future.done() for number in numbers)  # counted first
        done.append((numbers, tokens))

    worker = Worker(limits or Limits(), see)
    worker.submit(items)
    worker.start()
    worker.stop()
    return done, items


def row_of(number, words, options=WORDS[:2]):
    return Question(str(number), f"{'a ' * words}{number % 10}?", tuple(options), None)


def test_rows_of_like_length_share_a_pass_the_oldest_first(place):
    predictor = ArtefactStore([place / "mle"]).get(None).calibrated
    words = [40, 1, 1, 40, 90, 1, 40, 1]
    rows = [row_of(number, count) for number, count in enumerate(words)]
    done, items = passes_over(predictor, rows)
    assert [numbers for numbers, _ in done] == [{0, 3, 6}, {1, 2, 5, 7}, {4}]
    for numbers, tokens in done:
        assert tokens == sum(items[number].length for number in numbers)
    near = [row_of(number, 5 + number % 2) for number in range(8)]
    ((numbers, tokens),), items = passes_over(predictor, near)
    assert len(numbers) == 8
    assert 0 < tokens - sum(item.length for item in items) <= 32


def test_a_pass_counts_the_sequences_of_rows_with_many_options(place, tmp_path):
    run(*fitting(place, output=tmp_path / "text", method="mle", scoring="text"))
    predictor = ArtefactStore([tmp_path / "text"]).get(None).calibrated
    scorer = predictor.session.scorer
    assert isinstance(scorer, TextScorer)
    many = [f"{word} {number}" for word in WORDS for number in range(8)]
    rows = [row_of(number, 3, many if number < 3 else many[:2]) for number in range(6)]
    assert {scorer.sequences(encoded) for encoded in scorer.encode(rows)} == {1}
    scorer.layout = "expanded"
    done, items = passes_over(predictor, rows)
    assert items[0].sequences == 64
    assert max(tokens for _, tokens in done) <= max(4096, items[0].tokens)
    assert {number for numbers, _ in done for number in numbers if number > 2} == {3, 4, 5}
    assert all(not numbers & {3, 4, 5} or not numbers & {0, 1, 2} for numbers, _ in done)


def test_a_posterior_of_one_atom_has_the_tokens_of_one_pass(place):
    predictor = ArtefactStore([place / "mle"]).get(None).calibrated
    assert predictor.way.draws == 10
    rows = [row_of(number, 5) for number in range(10)]
    (encoded,) = predictor.session.scorer.encode(rows[:1])
    whole = Limits(pass_tokens=10 * encoded["length"])
    assert len(passes_over(predictor, rows, whole)[0]) == 1
    drawn = ArtefactStore([place / "blob"]).get(None).with_draws(10)
    assert [len(numbers) for numbers, _ in passes_over(drawn, rows, whole)[0]] == [4, 4, 2]
