import json
import subprocess
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from bayestune import runtime
from bayestune.adapters import Lora, adapted_layers, attach, bayesify
from bayestune.data import Question
from bayestune.evaluation import (
    EvaluationOptions,
    append_record,
    evaluate_posterior,
    prediction_rows,
    read_records,
)
from bayestune.forward import Draws
from bayestune.jsonl import write_json_lines
from bayestune.metrics import summarise
from bayestune.posteriors import Gaussian, Point, Prediction
from bayestune.runtime import git_revision
from bayestune.scoring import make_scorer, row_logits

ROWS = (
    Question(
        "long",
        "what is the answer for the question and the passage below?",
        ("red", "green", "blue"),
        2,
    ),
    Question("short", "red?", ("sky", "grass"), 0),
    Question("middle", "what is\u2028red and green?", ("the sky", "red", "A", "B"), 3),
    Question("other", "what is grass?", ("red", "sky"), 1),
    Question("short again", "sky?", ("sky", "grass", "the"), 1),
)
SETTINGS = EvaluationOptions(prediction_batch=2, resamples=50)


def adapted(llama, *, gaussian=True):
    model = attach(llama(initializer_range=0.2), Lora(rank=4))
    for layer in adapted_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
    if gaussian:
        bayesify(model, init_root_std=0.7)
    return model.eval()


@pytest.fixture(params=["letter", "text"])
def opened(request, llama, byte_level, tiny_task):
    """A random Gaussian posterior and its scorer."""
    model = adapted(llama)
    scorer = make_scorer(model, byte_level, replace(tiny_task, evaluation=ROWS), request.param)
    return Gaussian(model, scorer), scorer


def test_rows_keep_their_order_whatever_the_batches(opened):
    posterior, scorer = opened
    rows = scorer.encode(ROWS)
    assert [row["length"] for row in rows] != sorted(row["length"] for row in rows)
    alone = [posterior.logits(scorer.collate([row]), Draws(3)) for row in rows]
    for size in (1, 2, 3, len(rows)):
        logits = row_logits(posterior, scorer, rows, Draws(3), batch_size=size)
        assert logits.shape == (3, 5, 4)
        for i, expected in enumerate(alone):
            count = len(ROWS[i].options)
            assert_close(logits[:, i, :count], expected[:, 0], rtol=1e-4, atol=1e-4)
            assert (logits[:, i, count:] == -torch.inf).all()


def test_a_batch_of_narrow_rows_is_widened(opened):
    posterior, scorer = opened
    narrow = [ROWS[3], ROWS[1]]
    logits = row_logits(
        posterior, scorer, scorer.encode([*narrow, ROWS[2]]), Draws(2), batch_size=2
    )
    assert (logits[:, :2, 2:] == -torch.inf).all()
    assert logits[:, 2].isfinite().all()


def test_bfloat16_is_near_float32(opened):
    posterior, scorer = opened
    rows = scorer.encode(ROWS[:2])
    exact, rough = (
        row_logits(posterior, scorer, rows, Draws(1), bf16=bf16) for bf16 in (False, True)
    )
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    assert_close(rough[0, 0], exact[0, 0], rtol=0.1, atol=0.3)


def test_fewer_draws_are_the_first_of_more(opened):
    posterior, scorer = opened
    found = {
        n: p for n, p, _ in evaluate_posterior(posterior, scorer, ROWS, SETTINGS, progress=False)
    }
    assert list(found) == [0, 5, 10]
    rows = scorer.encode(ROWS)
    for count in (0, 5, 10):
        expected = Prediction.of(row_logits(posterior, scorer, rows, Draws(count)))
        assert_close(found[count].probabilities, expected.probabilities, rtol=1e-4, atol=1e-5)
    last_five = Prediction.of(row_logits(posterior, scorer, rows, Draws(10))[5:])
    assert (found[5].probabilities - last_five.probabilities).abs().max() > 0.01
    assert found[0].mutual_information.max() < 1e-9 < found[5].mutual_information.min()


def test_draws_follow_their_seed(opened):
    posterior, scorer = opened
    settings = replace(SETTINGS, draws=(2,), draw_seed=7)
    ((_, prediction, _),) = evaluate_posterior(posterior, scorer, ROWS, settings, progress=False)
    expected = Prediction.of(row_logits(posterior, scorer, scorer.encode(ROWS), Draws(2, seed=7)))
    assert_close(prediction.probabilities, expected.probabilities, rtol=1e-4, atol=1e-5)


def test_a_shared_prefix_is_for_draws_and_not_for_the_mean(opened):
    posterior, scorer = opened
    rows, settings = scorer.encode(ROWS), replace(SETTINGS, draws=(0, 3), shared_prefix=2)
    found = {
        n: p for n, p, _ in evaluate_posterior(posterior, scorer, ROWS, settings, progress=False)
    }
    for count, prefix in ((0, None), (3, 2)):
        which = Draws(count, shared_prefix=prefix)
        expected = Prediction.of(row_logits(posterior, scorer, rows, which, batch_size=2))
        assert_close(found[count].probabilities, expected.probabilities, rtol=1e-4, atol=1e-5)
    exact = Prediction.of(row_logits(posterior, scorer, rows, Draws(3)))
    assert (found[3].probabilities - exact.probabilities).abs().max() > 0.01


def test_a_posterior_with_atoms_shares_no_prefix(llama, byte_level, tiny_task):
    class Atoms:
        model, atoms, has_mean, asked = llama(), 3, False, []

        def logits(self, inputs, draws):
            self.asked.append(draws)
            return torch.zeros(draws.count, len(inputs["input_ids"]), 4)

    posterior, settings = Atoms(), replace(SETTINGS, shared_prefix=2)
    scorer = make_scorer(posterior.model, byte_level, tiny_task)
    ((count, *_),) = evaluate_posterior(posterior, scorer, ROWS[:2], settings, progress=False)
    assert count == 3
    assert [(draws.count, draws.shared_prefix) for draws in posterior.asked] == [(3, None)]


def test_all_draws_run_once(opened):
    posterior, scorer = opened
    asked = []
    logits, posterior.logits = (
        posterior.logits,
        lambda batch, draws: asked.append(draws.count) or logits(batch, draws),
    )
    list(
        evaluate_posterior(
            posterior, scorer, ROWS[:2], replace(SETTINGS, draws=(0, 1, 3)), progress=False
        )
    )
    assert sorted(asked) == [0, 3]


def test_a_point_is_evaluated_once(llama, byte_level, tiny_task):
    scorer = make_scorer(llama(), byte_level, tiny_task)
    calls = []
    point = Point(adapted(llama, gaussian=False), lambda *given: calls.append(0) or scorer(*given))
    found = list(evaluate_posterior(point, scorer, ROWS[:2], SETTINGS, progress=False))
    assert [count for count, *_ in found] == [0]
    assert len(calls) == 1


PREDICTION = Prediction.of(
    torch.tensor([[[2.0, 0, -torch.inf], [0, 1, 2]], [[0.0, 0, -torch.inf], [0, 3, 1]]])
)
TWO = (ROWS[1], ROWS[4])
RECORD = {"method": "blob", "draws": 2, "seed": 1, "label": f"blob{chr(0x2028)}N=2", "task": "tiny"}


def test_rows_say_all_of_a_prediction():
    first, second = prediction_rows(TWO, PREDICTION)
    assert {key: first[key] for key in ("id", "question", "options", "answer", "choice")} == {
        "id": "short",
        "question": "red?",
        "options": ["sky", "grass"],
        "answer": 0,
        "choice": 0,
    }
    p = (torch.tensor([2.0, 0]).softmax(-1)[0].item() + 0.5) / 2
    assert first["probabilities"] == pytest.approx([p, 1 - p])
    assert first["confidence"] == pytest.approx(p)
    assert (len(second["probabilities"]), second["choice"], second["answer"]) == (3, 1, 1)
    for row in (first, second):
        assert sum(row["probabilities"]) == pytest.approx(1)
        assert row["mutual_information"] == pytest.approx(
            row["total_entropy"] - row["expected_entropy"]
        )
        assert row["mutual_information"] > 0.01


def test_a_record_holds_what_a_table_needs(tmp_path):
    record = append_record(tmp_path, RECORD, TWO, PREDICTION, SETTINGS)
    assert read_records(tmp_path) == [record]
    assert {key: record[key] for key in RECORD} == RECORD
    assert (record["n"], record["bins"], record["binning"]) == (2, 15, "torchmetrics")
    assert set(record["versions"]) == {
        "python",
        "bayestune",
        "torch",
        "transformers",
        "peft",
        "accelerate",
    }
    assert record["peak_memory_mb"] > 1
    expected = summarise(PREDICTION.probabilities, torch.tensor([0, 1]), resamples=50)
    assert {"accuracy", "nll", "brier", "ece", "aurc"} <= set(record["metrics"])
    for name, interval in expected.items():
        got = record["metrics"][name]
        assert got["value"] == pytest.approx(interval.value, nan_ok=True)
        assert {"value", "low", "high"} <= set(got)
    assert record["metrics"]["accuracy"]["value"] == 1.0
    rows = (tmp_path / record["predictions"]).read_text(encoding="utf-8").split("\n")
    assert [json.loads(row) for row in rows if row] == prediction_rows(TWO, PREDICTION)


def test_the_settings_reach_the_metrics(tmp_path):
    settings = replace(SETTINGS, bins=2, binning="textbook")
    record = append_record(tmp_path, RECORD, TWO, CERTAIN, settings)
    assert (record["bins"], record["binning"]) == (2, "textbook")
    assert record["metrics"]["ece"]["value"] == pytest.approx(
        0.3
    )  # one bin holds both: |1/2 − (1 + 0.6)/2|
    for others in (replace(settings, bins=15), replace(settings, binning="torchmetrics")):
        record = append_record(tmp_path, RECORD, TWO, CERTAIN, others)
        assert record["metrics"]["ece"]["value"] == pytest.approx(
            0.7
        )  # a bin each: (|0 − 1| + |1 − 0.6|)/2


CERTAIN = Prediction.of(torch.tensor([[[0, 1.0], [0.4, 0.6]]]).log())


def test_records_are_appended_and_no_rows_are_overwritten(tmp_path):
    first = append_record(tmp_path, RECORD, TWO, PREDICTION, SETTINGS)
    line = (tmp_path / "records.jsonl").read_bytes()
    rows = (tmp_path / first["predictions"]).read_bytes()
    second = append_record(
        tmp_path, {**RECORD, "task": "another"}, TWO[:1], PREDICTION_OF_ONE, SETTINGS
    )
    assert (tmp_path / "records.jsonl").read_bytes().startswith(line)
    assert [record["task"] for record in read_records(tmp_path)] == ["tiny", "another"]
    assert first["predictions"] != second["predictions"]
    assert (tmp_path / first["predictions"]).read_bytes() == rows


PREDICTION_OF_ONE = Prediction.of(torch.tensor([[[2.0, 0]]]))


def test_no_records_in_a_new_folder(tmp_path):
    assert read_records(tmp_path / "none") == []


def test_json_lines_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_json_lines(path, [{"text": "é\u2028ü"}, {"n": 1}])
    before = path.read_bytes()
    assert [json.loads(row) for row in before.decode().split("\n") if row] == [
        {"text": "é\u2028ü"},
        {"n": 1},
    ]
    with pytest.raises(TypeError):
        write_json_lines(path, [{"n": 2}, {"n": object()}])
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def test_the_revision_is_of_the_checkout_or_none(monkeypatch):
    def absent(*_, **__):
        raise FileNotFoundError("git")

    def outside(*_, **__):
        raise subprocess.CalledProcessError(128, "git")

    for failure in (absent, outside):
        monkeypatch.setattr(runtime.subprocess, "run", failure)
        assert git_revision() is None
