"""What is said of two methods follows from the paired interval and p, and nothing else."""

import json
import math

import pytest
from recorded import evaluated, row

from bayestune.metrics import PairedDifference
from bayestune.report.claims import Evaluation, compare, listing, sentence, verdict
from bayestune.report.columns import ACCURACY, BRIER, NLL
from bayestune.report.rows import paired_tensors, read_rows, tensors


def read(folder, record):
    return Evaluation(record["label"], record, read_rows(record, folder))


def test_claims_follow_the_intervals(tmp_path):
    good = read(tmp_path, evaluated(tmp_path, "good", n=400))
    bad = read(tmp_path, evaluated(tmp_path, "bad", 6.0, n=400))
    compared = compare(bad, good)
    values = [one.record["metrics"]["nll"]["value"] for one in (good, bad)]
    assert compared[NLL].difference == pytest.approx(values[0] - values[1], abs=1e-12)
    nll, brier = (-compared[column].difference for column in (NLL, BRIER))
    assert sentence(bad, good, compared) == (
        "good against bad on the same 400 questions: better in "
        f"NLL (by {nll:.3f}) and Brier score (by {brier:.3f}); "
        "not settled by these rows: accuracy."
    )
    turned = sentence(good, bad, compare(good, bad))
    start = "bad against good on the same 400 questions: worse in NLL (by "
    assert turned.startswith(start)
    assert "better" not in turned


def test_equal_methods_are_not_told_apart(tmp_path):
    one, two = (read(tmp_path, evaluated(tmp_path, label)) for label in ("a", "b"))
    assert sentence(one, two, compare(one, two)) == (
        "b against a on the same 120 questions: "
        "not settled by these rows: accuracy, NLL and Brier score."
    )


@pytest.mark.parametrize(
    ("column", "low", "high", "p", "expected"),
    [
        (NLL, -0.3, -0.1, 0.01, 1),
        (NLL, 0.1, 0.3, 0.01, -1),
        (ACCURACY, 0.1, 0.3, 0.01, 1),
        (ACCURACY, -0.3, -0.1, 0.01, -1),
        (NLL, -0.3, 0.1, 0.01, 0),
        (NLL, -0.3, -0.1, 0.06, 0),
        (NLL, 0.0, 0.3, 0.01, 0),
    ],
)
def test_a_verdict_needs_the_interval_and_p(column, low, high, p, expected):
    assert verdict(column, PairedDifference((low + high) / 2, low, high, p, 100)) == expected


def test_only_shared_rows_of_one_task_are_compared(tmp_path):
    full = read(tmp_path, evaluated(tmp_path, "full"))
    part = read(tmp_path, evaluated(tmp_path, "part", 2.0))
    some = Evaluation("part", part.record, part.rows[49::-1])
    compared = compare(full, some)
    assert {paired.n for paired in compared.values()} == {50}
    losses = []
    for one in (full, part):
        losses.append([-math.log(r["probabilities"][r["answer"]]) for r in one.rows[:50]])
    expected = (sum(losses[1]) - sum(losses[0])) / 50
    assert compared[NLL].difference == pytest.approx(expected, abs=1e-12)
    other = Evaluation("part", {**part.record, "task": "other"}, part.rows)
    assert compare(full, other) == "they are of different tasks"
    renamed = [{**r, "id": f"z{r['id']}"} for r in part.rows]
    assert compare(full, Evaluation("part", part.record, renamed)) == "they have no row in common"
    missing = Evaluation("part", part.record, [])
    reason = compare(full, missing)
    assert sentence(full, missing, reason) == (
        "part cannot be compared with full here: the predictions of part are missing."
    )


def test_words_are_listed_as_in_a_sentence():
    assert [listing("abc"[:n]) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]


# Rows


def test_rows_are_read_as_written(tmp_path):
    rows = [row(0, [0.9, 0.1], 0), row(1, [0.3, 0.7], 0)]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_rows({"predictions": "r.jsonl"}, tmp_path) == rows
    assert read_rows({"predictions": "gone"}, tmp_path) == read_rows({}, tmp_path) == []


def test_tensors_pad_what_has_fewer_options():
    probabilities, answers = tensors([row(0, [0.9, 0.1], 0), row(1, [0.2, 0.3, 0.5], 2)])
    assert probabilities.tolist() == [[0.9, 0.1, 0.0], [0.2, 0.3, 0.5]]
    assert answers.tolist() == [0, 2]


def test_rows_are_matched_by_id_and_answer():
    first = [row(i, [0.5, 0.5], 0) for i in (0, 1, 2)]
    second = [row(i, [i / 10, 1 - i / 10], int(i == 1)) for i in (2, 1, 0)]
    one, two, answers = paired_tensors([(first, second)])
    assert one.shape == (1, 2, 2)
    assert two[0, :, 0].tolist() == [0.0, 0.2]
    assert answers.tolist() == [0, 0]
    assert paired_tensors([(first, second), (first, first[1:2])]) is None
    assert paired_tensors([]) is None


def test_rows_that_ask_something_else_are_not_matched_by_their_place_in_a_file():
    texts = ("red?", "green?", "blue?", "grey?")
    asked = [{"question": text, "options": ["yes", "no"]} for text in texts]
    first = [{**row(i, [0.5, 0.5], 0), **asked[i]} for i in range(3)]
    second = [{**row(i, [i / 10, 1 - i / 10], 0), **asked[i]} for i in range(3)]
    second[1] |= asked[3]  # the row in that place was replaced
    _, two, answers = paired_tensors([(first, second)])
    assert two[0, :, 0].tolist() == [0.0, 0.2]
    assert answers.tolist() == [0, 0]
    bare = [row(i, [0.5, 0.5], 0) for i in range(3)]
    assert paired_tensors([(bare, second)])[2].tolist() == [0, 0, 0]
