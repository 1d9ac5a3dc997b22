"""The page is well formed, loads nothing, escapes everything, and holds what the records say."""

import gzip
import json
import re
from pathlib import Path

import pytest
import torch
from recorded import Page, evaluated, record, row, sampled_rows, shown, with_rows

from bayestune.metrics import is_right, nll, paired_bootstrap, risk_coverage
from bayestune.report import Origin, read_rows, write_page
from bayestune.report.page_json import as_json
from bayestune.report.rows import tensors

HOSTILE = "</script><script>alert('x')</script> <!-- \"q\" \\ & \u2028 \x00\x07 \ud800 日本"
RESULTS = Path(__file__).parents[2] / "results"


def written(records, folder, title="t", **more):
    path = write_page({folder: records}, folder / "report.html", title, **more)
    return path.read_text(encoding="utf-8")


def change_rows(folder, record, change):
    """Changes each row in the record's file; returns all of them."""
    rows = read_rows(record, folder)
    for i, one in enumerate(rows):
        one.update(change(i))
    (folder / record["predictions"]).write_text("\n".join(map(json.dumps, rows)))
    return rows


# The file


@pytest.mark.parametrize("count", [1, 8])
def test_page_is_whole_and_loads_nothing(tmp_path, count):
    records = [evaluated(tmp_path, f"m{i}", 1 + i / 2) for i in range(count)]
    page = written(records, tmp_path, "A <script>alert(1)</script> title")
    parsed = Page(page)
    loading = {"link", "img", "iframe", "object", "embed", "audio", "video", "base"}
    assert loading.isdisjoint(parsed.tags)
    names = {name for name, _ in parsed.attributes}
    assert {"src", "srcset", "href", "action", "poster"} & names == {"href"}
    hrefs = [value for name, value in parsed.attributes if name == "href"]
    assert all(value.startswith("#") for value in hrefs)
    assert not [name for name in names if name.startswith("on")]
    style = page.split("<style>")[1].split("</style>")[0]
    assert not re.search(r"url\(|@import|https?:", style)
    assert "prefers-color-scheme: dark" in style
    assert "sourceMappingURL" not in page
    own = page.rsplit("<script>", 1)[1]
    assert not re.search(r"https?:|fetch\(|XMLHttpRequest|import\(|innerHTML|eval\(", own)
    ids = [value for name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert [run["name"] for run in parsed.data["runs"]] == [f"m{i}" for i in range(count)]
    assert all(f"m{i}" in parsed.text for i in range(count))  # also without JavaScript


def test_hostile_text_comes_through_as_it_is(tmp_path):
    one = evaluated(tmp_path, "BLoB", n=20)
    one |= {"label": f"BLoB {HOSTILE}", "task": HOSTILE, "config": {"note": HOSTILE}}
    asked = {"question": HOSTILE, "context": HOSTILE, "options": [HOSTILE, "b", "</style>"]}
    change_rows(tmp_path, one, lambda _: asked)
    page = written([one], tmp_path, HOSTILE, origin=Origin(f"bayestune '{HOSTILE}'"))
    parsed = Page(page)
    assert parsed.tags.count("script") == 6  # data, charts, three of Vega, the page's own
    assert "alert('x')</script>" not in page
    data = parsed.data
    question = data["questions"][0]
    assert question["question"] == question["context"] == question["options"][0] == HOSTILE
    assert data["title"] == data["runs"][0]["task"] == HOSTILE
    assert data["runs"][0]["settings"]["config"]["note"] == HOSTILE
    assert data["command"] == f"bayestune '{HOSTILE}'"


def test_numbers_that_json_cannot_hold_are_null(tmp_path):
    one = evaluated(tmp_path, "MLE", n=20)
    one["metrics"]["nll"] |= {"value": 1.0, "low": float("nan"), "high": float("inf")}
    one |= {"config": {"rate": float("inf"), "deep": [float("nan")]}}
    (run,) = shown([one], tmp_path)["runs"]
    assert run["metrics"]["nll"] == [1.0, None, None, None]
    assert run["settings"]["config"] == {"rate": None, "deep": [None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        as_json({"x": float("nan")})


@pytest.mark.parametrize(("rows", "options", "draws"), [(1500, 4, 10), (150, 100, 10)])
def test_a_page_stays_below_five_megabytes(tmp_path, rows, options, draws):
    def some(i):
        p = [1 / options] * options
        asked = {"question": "問題" * 1200, "options": [f"選択肢 {k} " * 9 for k in range(options)]}
        return row(i, p, i % options, mutual=0.1, drawn=[p] * draws, **asked)

    listed = [some(i) for i in range(rows)]
    records = [with_rows(tmp_path, listed, f"m{i}", accuracy=0.5) for i in range(3)]
    data = shown(records, tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 5_000_000
    assert len(data["questions"]) + data["left_out"] == rows
    assert len(data["questions"]) >= 100
    assert sum(one["n"] for one in data["runs"][0]["reliability"]) == rows  # charts are of all


def test_rows_that_are_left_out_are_those_that_all_runs_get_right(tmp_path):
    asked = {"question": "q" * 6000}
    rows = [row(i, [0.9, 0.1], int(i % 50 == 0), **asked) for i in range(3000)]
    data = shown([with_rows(tmp_path, rows, "MLE", accuracy=0.5)], tmp_path)
    wrong = {one["id"] for one in data["questions"] if one["answer"] == 1}
    assert data["left_out"] > 0
    assert wrong == {f"q{i}" for i in range(0, 3000, 50)}


def test_too_many_runs_are_refused_before_anything_is_written(tmp_path):
    records = [record(f"m{i}", accuracy=0.5, config={"x": "y" * 500_000}) for i in range(12)]
    with pytest.raises(ValueError, match=r"12 runs, whose figures take .* give fewer results"):
        written(records, tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_page_without_records_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got no records"):
        written([], tmp_path)
    assert not (tmp_path / "report.html").exists()


# The figures


def test_records_and_paired_tests_are_told(tmp_path):
    facts = {"seconds": {"fit": 12.34, "predict": 6.0}, "timed_draws": 20, "draws": 10}
    records = [evaluated(tmp_path, "MLE", 3.0), evaluated(tmp_path, "BLoB N=10", **facts)]
    data = shown(
        records, tmp_path, origin=Origin("bayestune report a b", "abc1234", {"torch": "9.8.7"})
    )
    first, other = data["runs"]
    for key, value in records[1]["metrics"].items():
        assert other["metrics"][key][0] == pytest.approx(value["value"], abs=1e-5)
    assert (first["base"], other["base"]) == (0, 0)
    assert "paired" not in first
    p, answers = tensors(read_rows(records[1], tmp_path))
    before, _ = tensors(read_rows(records[0], tmp_path))
    expected = paired_bootstrap(p, before, answers, "nll", 1000)
    told = other["paired"]["nll"]
    values = [expected.difference, expected.low, expected.high, expected.p_value]
    assert told[:4] == pytest.approx(values, abs=1e-5)
    assert other["paired"]["n"] == 120
    # ten of twenty timed draws take half of the time
    assert other["cost"]["ms"] == pytest.approx(1000 * 6.0 / 120 / 2)
    assert other["cost"]["passes"] == 10
    assert (data["command"], data["revision"]) == ("bayestune report a b", "abc1234")
    assert data["versions"] == {"torch": "9.8.7"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]+\+00:00", data["date"])
    assert "BLoB N=10 against MLE on the same 120 questions" in data["words"][1]


def test_a_run_is_compared_with_the_first_of_its_task_and_seed(tmp_path):
    places = [("MLE", "a", 1), ("MLE", "a", 2), ("MLE", "b", 1), ("BLoB", "a", 2), ("BLoB", "b", 1)]
    records = [evaluated(tmp_path, name, task=task, seed=seed, n=30) for name, task, seed in places]
    data = shown(records, tmp_path)
    assert [run["base"] for run in data["runs"]] == [0, 1, 2, 1, 2]
    records = [one for one in records if one["task"] == "a"]
    records += [one | {"model": "another"} for one in records]
    # its own model's first; the first of another model is compared with that method of the other
    data = shown(records, tmp_path)
    assert [run["base"] for run in data["runs"]] == [0, 1, 1, 0, 0, 4]


def test_runs_of_one_name_are_told_apart(tmp_path):
    records = [evaluated(tmp_path, "MLE", n=20), evaluated(tmp_path, "MLE", 2.0, n=20)]
    assert [run["name"] for run in shown(records, tmp_path)["runs"]] == ["MLE", "MLE (2)"]


def test_missing_rows_are_told_and_gzipped_ones_are_read(tmp_path):
    records = [evaluated(tmp_path, label) for label in ("MLE", "BLoB", "MAP")]
    lost, packed = (tmp_path / one["predictions"] for one in records[1:])
    lost.unlink()
    packed.with_name(f"{packed.name}.gz").write_bytes(gzip.compress(packed.read_bytes()))
    packed.unlink()
    data = shown(records, tmp_path)
    assert data["runs"][1]["paired"] == "the predictions of BLoB are missing"
    assert "reliability" not in data["runs"][1]
    assert data["runs"][2]["paired"]["n"] == 120
    assert set(data["answers"]) == {"0", "2"}


# What is behind the charts


def test_a_bin_holds_its_rows_and_the_band_of_a_calibrated_model(tmp_path):
    records = [evaluated(tmp_path, "MLE", n=2000), evaluated(tmp_path, "sharp", 3.0, n=2000)]
    calibrated, sharp = (run["reliability"] for run in shown(records, tmp_path)["runs"])
    rows = read_rows(records[0], tmp_path)
    right = is_right(rows).tolist()
    for one in calibrated:
        own = [i for i, r in enumerate(rows) if one["low"] < r["confidence"] <= one["high"]]
        assert abs(one["n"] - len(own)) <= 1  # ends are rounded
        mean = sum(right[i] for i in own) / len(own)
        assert one["accuracy"] == pytest.approx(mean, abs=1.5 / len(own))
        assert one["least"] <= one["confidence"] + 0.02
        assert one["most"] >= one["confidence"] - 0.02
        # nine in ten of accuracies whose standard deviation is that of a binomial share
        std = (one["confidence"] * (1 - one["confidence"]) / one["n"]) ** 0.5
        if one["n"] > 60:
            assert one["most"] - one["least"] == pytest.approx(3.29 * std, rel=0.25)

    def outside(bins):
        return sum(not one["least"] <= one["accuracy"] <= one["most"] for one in bins)

    assert outside(calibrated) <= 3
    assert outside(sharp) > 5


def test_a_curve_is_of_all_rows_and_has_the_calibrated_threshold(tmp_path):
    rows = sampled_rows(500)
    confidence = torch.tensor([one["confidence"] for one in rows], dtype=torch.float64)
    for one in rows:
        unsure = 1 - one["confidence"]
        one |= {"decision": "act" if unsure <= 0.3 else "abstain"}
        one |= {"score": {"name": "one_minus_confidence", "value": unsure, "threshold": 0.3}}
        one |= {"calibration": {"risk": 0.2, "confidence": 0.9}}
    found = with_rows(tmp_path, rows, "BLoB", accuracy=0.5)
    (run,) = shown([found], tmp_path)["runs"]
    curve = run["coverage"]
    risk = risk_coverage(confidence, is_right(rows))
    assert curve["points"][-1] == [1.0, pytest.approx(float(risk[-1]), abs=1e-4)]
    assert len(curve["points"]) == 120
    for coverage, value in curve["points"]:
        assert value == pytest.approx(float(risk[round(coverage * 500) - 1]), abs=1e-4)
    acts = confidence >= 0.7
    wrong = int((acts & ~is_right(rows)).sum())
    kept = curve["threshold"]
    assert (kept["acted"], kept["wrong"], kept["value"]) == (int(acts.sum()), wrong, 0.3)
    assert (kept["promised"], kept["held_with"]) == (0.2, 0.9)
    assert kept["risk"] == pytest.approx(wrong / int(acts.sum()), abs=1e-4)


def test_a_gate_that_acts_on_nothing_has_no_risk(tmp_path):
    decided = {"decision": "abstain", "score": {"name": "x", "value": None, "threshold": None}}
    rows = [one | decided for one in sampled_rows(20)]
    (run,) = shown([with_rows(tmp_path, rows, "BLoB", accuracy=0.5)], tmp_path)["runs"]
    assert run["coverage"]["threshold"]["acted"] == 0
    assert run["coverage"]["threshold"]["risk"] is None


def test_histograms_count_each_row_once(tmp_path):
    rows = [row(0, [1.0, 0.0], 0), row(1, [0.5, 0.5], 0), row(2, [0.76, 0.24], 1)]
    (run,) = shown([with_rows(tmp_path, rows, "MLE", accuracy=0.5)], tmp_path)["runs"]
    found = run["histograms"]["one_minus_confidence"]
    # as a share of the most, one half: 0, 1 and 0.48
    assert [i for i, n in enumerate(found["right"]) if n] == [0, 19]
    assert [i for i, n in enumerate(found["wrong"]) if n] == [9]
    assert found["error_auroc"] == 0.5
    for one in run["histograms"].values():
        assert (sum(one["right"]), sum(one["wrong"])) == (2, 1)


def test_shift_is_between_runs_of_one_fit(tmp_path):
    same = {"trained_on": "arc_easy", "n": 60}
    records = [
        evaluated(tmp_path, "BLoB", **same),
        evaluated(tmp_path, "BLoB", 0.3, task="mmlu", **same),
        evaluated(tmp_path, "MLE", 0.3, task="mmlu", **same),
    ]
    (shift,) = shown(records, tmp_path)["shifts"]
    assert (shift["familiar"], shift["shifted"]) == (0, 1)
    assert shift["auroc"]["one_minus_confidence"] > 0.6  # flatter: less certain
    assert not shown(records[1:], tmp_path)["shifts"]


def test_draws_average_to_the_run(tmp_path):
    rows = sampled_rows(80)
    generator = torch.Generator().manual_seed(0)
    for one in rows:
        draws = torch.rand(6, 3, generator=generator, dtype=torch.float64) + 0.2
        draws /= draws.sum(1, keepdim=True)
        one |= {"probabilities": draws.mean(0).tolist(), "drawn": draws.tolist()}
        one["confidence"] = max(one["probabilities"])
    few = with_rows(tmp_path, sampled_rows(80), "BLoB N=0", name="BLoB", draws=0, nll=1.0)
    many = with_rows(tmp_path, rows, "BLoB N=6", name="BLoB", draws=6, nll=1.1)
    other = with_rows(tmp_path, sampled_rows(80), "MLE", draws=0, nll=1.2)
    (fit,) = shown([many, few, other], tmp_path)["fits"]
    assert (fit["name"], fit["runs"]) == ("BLoB", [1, 0])
    assert [one["draws"] for one in fit["prefixes"]] == [1, 2, 3, 4, 5, 6]
    assert fit["prefixes"][-1]["nll"] == pytest.approx(nll(*tensors(rows)), abs=2e-4)
    first = [one | {"probabilities": one["drawn"][0]} for one in rows]
    assert fit["prefixes"][0]["nll"] == pytest.approx(nll(*tensors(first)), abs=2e-4)


def test_classes_are_options_that_all_rows_have_or_else_places(tmp_path):
    rows = [row(i, [0.6, 0.3, 0.1], i % 2, options=["x", "y", "z"]) for i in range(10)]
    (run,) = shown([with_rows(tmp_path, rows, "MLE", accuracy=0.5)], tmp_path)["runs"]
    assert run["classes"]["names"] == ["x", "y", "z"]
    assert run["classes"]["counts"] == [[5, 0, 0], [5, 0, 0], [0, 0, 0]]
    # rows, precision, recall, F1: 5 of 10 chosen are right, none of the others is chosen
    expected = [[5, 0.5, 1.0, 0.6667], [5, None, 0.0, 0.0], [0, None, None, None]]
    assert run["classes"]["figures"] == expected
    rows[0]["options"] = ["other", "y", "z"]
    (run,) = shown([with_rows(tmp_path, rows, "MLE", accuracy=0.5)], tmp_path)["runs"]
    assert (run["classes"]["names"], run["classes"]["shared"]) == (["A", "B", "C"], False)
    uneven = [row(0, [0.6, 0.4], 0), row(1, [0.6, 0.3, 0.1], 1)]
    (run,) = shown([with_rows(tmp_path, uneven, "MLE", accuracy=0.5)], tmp_path)["runs"]
    assert run["classes"] is None


def test_the_posterior_is_shown_against_its_prior(tmp_path):
    fit = {"std": {"m.layers.0.q_proj.lora_A": 0.1}, "prior_std": 0.2}
    fit |= {"history": [{"step": 5, "loss": 1.5, "kl": 30.0}]}
    (run,) = shown([evaluated(tmp_path, "BLoB", fit=fit, n=20)], tmp_path)["runs"]
    assert run["fit"]["slots"] == [["m.layers.0.q_proj.lora_A", 0.5]]
    assert run["fit"]["history"] == fit["history"]


def test_an_answer_is_its_row_in_ten_thousandths(tmp_path):
    asked = {"question": "Which?", "context": "Here.", "options": ["a", "b"]}
    more = {"drawn": [[0.5, 0.5], [0.75, 0.25]], "decision": "act", "set": [0]}
    rows = [row(0, [0.625, 0.375], 1, mutual=0.05, **asked, **more)]
    data = shown([with_rows(tmp_path, rows, "BLoB", accuracy=0.0)], tmp_path)
    assert data["questions"] == [{"id": "q0", "answer": 1, **asked}]
    entropies = [0.425, 0.375, 0.05]
    answer = [0, [6250, 3750], *entropies, "act", [0], [[5000, 5000], [7500, 2500]]]
    assert data["answers"] == {"0": [answer]}


def test_the_committed_results_make_a_page(tmp_path):
    records = [json.loads(line) for line in (RESULTS / "demo/records.jsonl").open()]
    to = write_page({RESULTS / "demo": records}, tmp_path / "a/report.html", "demo")
    data = Page(to.read_text(encoding="utf-8")).data
    assert [len(data["answers"][str(i)]) for i in range(5)] == [240] * 5
    assert data["left_out"] == 0
    assert data["fits"][0]["runs"] == [2, 3]
