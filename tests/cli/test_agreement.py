"""`compare`, `evaluate`, `predict` and `bench` say the same of one posterior and the same rows."""

import json

import pytest
import yaml

from bayestune.bench.keys import lasting
from bayestune.evaluation import read_records
from bayestune.methods import changed
from bayestune.report.rows import read_rows as rows_of
from bayestune.training import Training
from running import fitting, furnish, own_rows, predicted, probabilities, run, write_rows

CASES = {
    # rows whose passages the fitted prompt shows, evaluated on some that have none
    "passages": {"method": "blob", "bf16": "true", "learning_rate": 0.1},
    "text": {"method": "ensemble", "scoring": "text", "seed": 3},
    "head": {"method": "mc_dropout", "scoring": "head", "learning_rate": 0.1},
}
LABELS = {"passages": "BLoB N=2", "text": "Ensemble", "head": "MCDropout N=2"}
VOLATILE = ("seconds", "peak_memory_mb", "predictions", "task", "date")
TESTED = [{**row, "options": ["red", "green"], "answer": 1} for row in own_rows(5, start=3)]


def trained_on(case):
    context = "the sky is blue" if case == "passages" else ""
    rows = [{**row, "options": ["red", "green"]} for row in own_rows(8, context=context)]
    return [{**row, "answer": i % 2} for i, row in enumerate(rows)]


def grid(place, method, **given):
    """The settings of `fitting` as a grid of one cell."""
    training = {"steps": 3, "batch_size": 2, "lora": {"rank": 2}}
    training |= {name: given.pop(name) for name in ("bf16", "learning_rate") if name in given}
    if "bf16" in training:
        training["bf16"] = True
    files = {"data": str(place / "train.jsonl"), "evaluation_data": str(place / "test.jsonl")}
    return {
        "models": [str(place / "model")],
        "tasks": {"train": {"questions": files}},
        "methods": {method: None},
        "seeds": [given.get("seed", 1)],
        "questions": {"scoring": given.get("scoring", "letter")},
        "training": training,
        "predicting": {"draws": [0, 2], "resamples": 20},
    }


@pytest.fixture
def place(tmp_path, llama, byte_level):
    """A folder with rows and a model whose answers are not all alike."""
    return furnish(tmp_path, llama(initializer_range=0.3), byte_level)


@pytest.fixture(params=CASES)
def case(request, place, bert):
    """A case whose model and rows are in place."""
    if request.param == "head":
        bert().save_pretrained(place / "model")
    write_rows(place / "train.jsonl", trained_on(request.param))
    write_rows(place / "test.jsonl", TESTED)
    write_rows(place / "ask.jsonl", TESTED)
    return request.param


def told(folder):
    """The last record of a folder, and the probabilities of its rows."""
    record = read_records(folder)[-1]
    return record, probabilities(rows_of(record, folder))


def test_four_commands_agree(place, case):
    given = CASES[case]
    method = given["method"]
    options = {name: value for name, value in given.items() if name != "method"}
    evaluating = {"draws": "[0,2]", "resamples": 20}
    test = {"evaluation_data": place / "test.jsonl"}
    run(*fitting(place, "compare", methods=f"[{method}]", **options, **evaluating, **test))
    posterior = place / "out" / method
    rows = [f"--{name}={value}" for name, value in {**evaluating, **test}.items()]
    run("evaluate", f"--posterior={posterior}", *rows, f"--output={place / 'evaluated'}")
    (place / "grid.yaml").write_text(yaml.safe_dump(grid(place, **given)))
    run("bench", place / "grid.yaml", f"--output={place / 'grid'}")

    found = [told(place / name) for name in ("out", "evaluated", "grid")]
    (compared, expected), (evaluated, _), (computed, _) = found
    answered = predicted(place, "--draws=2", posterior=f"out/{method}")
    for numbers in (*(numbers for _, numbers in found), probabilities(answered)):
        assert numbers == pytest.approx(expected, abs=1e-6)
    for record, _ in found:
        assert (record["method"], record["label"]) == (method, LABELS[case])
        assert record["config"]["bf16"] is (case == "passages")
        assert record["seconds"]["fit"] > 0
    assert set(compared) == set(evaluated) == set(computed) - {"cell", "trained_on"}
    for key in set(compared) - {*VOLATILE, "config"}:
        assert compared[key] == evaluated[key] == computed[key], key
    assert compared["config"] == evaluated["config"]
    assert set(compared["config"]) == set(computed["config"])
    for key in ("method", "predicting", "dtype"):
        assert compared["config"][key] == computed["config"][key]
    trainings = [changed(Training(), one["config"]["training"]) for one in (compared, computed)]
    assert lasting(trainings[0]) == lasting(trainings[1])
    assert json.loads((posterior / "posterior.json").read_text())["method"] == method


def test_bf16_can_be_asked_for_and_declined(place):
    run(*fitting(place, method="mle", bf16="true", learning_rate=0.1))
    fitted = probabilities(predicted(place))
    assert probabilities(predicted(place, "--bf16")) == fitted
    exact = probabilities(predicted(place, "--bf16=false"))
    assert exact != fitted
    assert exact == pytest.approx(fitted, abs=0.2)
    test = f"--evaluation_data={place / 'test.jsonl'}"
    for more in ((), ("--bf16=false",)):
        run("evaluate", f"--posterior={place / 'out'}", test, "--resamples=20", *more)
    assert [record["config"]["bf16"] for record in read_records(place / "out")] == [True, False]
