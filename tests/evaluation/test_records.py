from dataclasses import replace
from datetime import datetime

import pytest
import torch
from stand_ins import Atoms

from bayestune.data import Question
from bayestune.evaluation import (
    EvaluationOptions,
    append_results,
    label_of,
    make_result,
    prediction_rows,
    read_records,
)
from bayestune.evaluation.adaptive import AdaptivePrediction
from bayestune.evaluation.evaluate import Evaluated
from bayestune.metrics import summarise
from bayestune.posteriors import Prediction
from bayestune.report.rows import read_rows

ROWS = (
    Question("short", "red?", ("sky", "grass"), 0),
    Question("again", "sky?", ("sky", "grass", "the"), 1),
)
PREDICTION = Prediction.of(
    torch.tensor([[[2.0, 0, -torch.inf], [0, 1, 2]], [[0.0, 0, -torch.inf], [0, 3, 1]]])
)
OPTIONS = EvaluationOptions(resamples=50)
FACTS = {
    "method": "blob",
    "seed": 1,
    "label": f"blob{chr(0x2028)}N=2",
    "task": "tiny",
    "config": {"dtype": "float32"},
    "seconds": {"fit": 7.5},
}


def result(prediction=PREDICTION, options=OPTIONS, rows=ROWS, **facts):
    return make_result({**FACTS, **facts}, rows, Evaluated(2, prediction, 1.26, 10), options)


def test_rows_say_all_of_a_prediction():
    first, second = prediction_rows(ROWS, PREDICTION)
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
        epistemic = row["total_entropy"] - row["expected_entropy"]
        assert row["mutual_information"] == pytest.approx(2 * epistemic)
        assert row["mutual_information"] > 0.01
    (bare, _) = prediction_rows(ROWS, PREDICTION, texts=False)
    assert set(first) - set(bare) == {"question", "options", "choice_text"}
    adaptive = AdaptivePrediction(**vars(PREDICTION), draws_used=torch.tensor([6, 8]))
    assert [row["draws"] for row in prediction_rows(ROWS, adaptive)] == [6, 8]


def test_a_record_holds_what_a_table_needs(tmp_path):
    assert read_records(tmp_path / "none") == []
    append_results(tmp_path, [result()])
    (record,) = read_records(tmp_path)
    for key in ("method", "seed", "label", "task"):
        assert record[key] == FACTS[key]
    assert (record["draws"], record["timed_draws"], record["n"]) == (2, 10, 2)
    assert record["seconds"] == {"fit": 7.5, "predict": 1.3}
    assert record["config"]["dtype"] == "float32"
    assert record["config"]["predicting"]["resamples"] == 50
    libraries = {"python", "bayestune", "torch", "transformers", "peft", "accelerate"}
    assert set(record["versions"]) == libraries
    assert record["peak_memory_mb"] > 1
    expected = summarise(PREDICTION.probabilities, torch.tensor([0, 1]), resamples=50)
    assert {"accuracy", "nll", "brier", "ece", "aurc"} <= set(record["metrics"])
    for name, interval in expected.items():
        got = record["metrics"][name]
        assert got["value"] == pytest.approx(interval.value, nan_ok=True)
        assert {"value", "low", "high"} <= set(got)
    assert record["metrics"]["accuracy"]["value"] == 1.0
    rows = read_rows(record, tmp_path)
    losses = [row.pop("nll") for row in rows]
    first, second = (row.pop("drawn") for row in rows)
    assert [len(draw) for draw in (*first, *second)] == [2, 2, 3, 3]  # of a row's own options
    assert first[1] == [0.5, 0.5]
    mean = torch.tensor(second).mean(0).tolist()
    assert mean == pytest.approx(rows[1]["probabilities"], abs=1e-4)
    assert datetime.fromisoformat(record["date"]).tzinfo is not None
    assert rows == prediction_rows(ROWS, PREDICTION)
    assert sum(losses) / 2 == pytest.approx(record["metrics"]["nll"]["value"])
    assert read_rows({**record, "predictions": "gone.jsonl"}, tmp_path) == []


def test_a_row_tells_its_context_and_at_most_32_draws(tmp_path):
    many = Prediction.of(torch.randn(40, 2, 3))
    rows = (replace(ROWS[0], context="There.", options=("sky", "grass", "the")), ROWS[1])
    first, second = result(many, rows=rows).rows
    assert (first["context"], "context" in second) == ("There.", False)
    assert len(first["drawn"]) == 32
    assert "context" not in result(many, replace(OPTIONS, texts=False), rows).rows[0]
    assert "drawn" not in result(Prediction.of(torch.randn(1, 2, 3)), rows=rows).rows[0]


def test_the_options_reach_the_metrics():
    certain = Prediction.of(torch.tensor([[[0, 1.0], [0.4, 0.6]]]).log())
    options = replace(OPTIONS, bins=2, binning="textbook")
    record = result(certain, options).record
    assert (record["bins"], record["binning"]) == (2, "textbook")
    # one bin holds both: |1/2 − (1 + 0.6)/2|; or a bin each: (|0 − 1| + |1 − 0.6|)/2
    assert record["metrics"]["ece"]["value"] == pytest.approx(0.3)
    for others in (replace(options, bins=15), replace(options, binning="torchmetrics")):
        assert result(certain, others).record["metrics"]["ece"]["value"] == pytest.approx(0.7)


def test_records_are_appended_and_no_rows_are_overwritten(tmp_path):
    append_results(tmp_path, [result()])
    (first,) = read_records(tmp_path)
    line = (tmp_path / "records.jsonl").read_bytes()
    append_results(tmp_path, [result(task="another"), result(task="third")])
    assert (tmp_path / "records.jsonl").read_bytes().startswith(line)
    records = read_records(tmp_path)
    assert [record["task"] for record in records] == ["tiny", "another", "third"]
    assert len({record["predictions"] for record in records}) == 3
    assert read_rows(first, tmp_path) == read_rows(records[1], tmp_path)


def test_of_several_records_all_are_kept_or_none(tmp_path):
    append_results(tmp_path, [result()])
    before = (tmp_path / "records.jsonl").read_bytes()
    with pytest.raises(TypeError):
        append_results(tmp_path, [result(task="good"), result(task=object())])
    assert (tmp_path / "records.jsonl").read_bytes() == before


def test_a_label_says_how_many_draws_and_which_prefix(llama):
    many = Atoms(None, torch.zeros(3, 2))
    assert label_of("Ensemble", 3, many, 16) == "Ensemble"
    many.atoms = None
    assert label_of("BLoB", 5, many) == "BLoB N=5"
    assert label_of("BLoB", 5, many, 16) == "BLoB N=5, prefix 16"
    assert label_of("BLoB", 0, many, 16) == "BLoB N=0"
