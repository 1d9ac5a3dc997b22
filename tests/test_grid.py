"""The paper's table, by hand."""

import json
import math
import re

import pytest

from bayestune.report.grid import DASH, Value, escaped, grid_tables, render_grid
from bayestune.report.significance import significance


def record(label, seed, task="arc_easy", n=10, **metrics):
    return {
        "label": label,
        "method": label,
        "seed": seed,
        "task": task,
        "trained_on": metrics.pop("trained_on", task),
        "model": "tiny_model",
        "scoring": "letter",
        "n": n,
        "bins": 15,
        "binning": "torchmetrics",
        "metrics": {
            key: {"value": value, "low": 0.0, "high": 1.0} for key, value in metrics.items()
        },
    }


RECORDS = [
    record("MLE", 1, accuracy=0.50, nll=1.0, ece=0.30),
    record("MLE", 2, accuracy=0.60, nll=1.4, ece=0.20),
    record("BLoB N=0", 1, accuracy=0.55, nll=0.7, ece=0.1),
    record("BLoB N=0", 2, accuracy=0.55, nll=0.9, ece=0.1),
    record("BLoB N=10", 1, accuracy=0.40, nll=0.6, ece=0.2),
    record("MLE", 1, "openbookqa", n=20, accuracy=0.3, nll=2.0),
    record("BLoB N=10", 1, "arc_easy", trained_on="openbookqa", accuracy=0.2),
]


def block(title):
    (table,) = grid_tables(RECORDS)
    (found,) = [b for b in table.blocks if b.title == title]
    return dict(found.rows)


def test_mean_and_standard_deviation_over_seeds():
    (table,) = grid_tables(RECORDS)
    assert table.columns == ("arc_easy (n=10)", "openbookqa (n=20)", "openbookqa → arc_easy (n=10)")
    assert table.caption == (
        "tiny_model · scored by letter · ECE in 15 bins (torchmetrics) · mean ± standard deviation over 2 seeds"
    )
    # standard deviations with n − 1: 10/√2, 0.4/√2, 0.2/√2
    assert block("ACC % ↑")["MLE"] == (
        Value("55.0", "7.1", "", "best"),
        Value("30.0", "", "1"),
        Value(),
    )
    assert block("NLL ↓")["MLE"][0] == Value("1.200", "0.283", "", "")
    assert block("NLL ↓")["BLoB N=0"][0] == Value("0.800", "0.141", "", "second")
    assert block("NLL ↓")["BLoB N=10"][0] == Value("0.600", "", "1", "best")


def test_equal_as_printed_is_equally_good_and_one_alone_is_not_marked():
    accuracy = block("ACC % ↑")
    assert [accuracy[label][0].mark for label in accuracy] == ["best", "best", "second"]
    ece = block("ECE % ↓")
    assert [(ece[label][0].number, ece[label][0].mark) for label in ece] == [
        ("25.0", ""),
        ("10.0", "best"),
        ("20.0", "second"),
    ]
    assert block("NLL ↓")["MLE"][1].mark == ""


def test_what_is_missing_is_a_dash():
    assert block("NLL ↓")["BLoB N=0"][1:] == (Value(DASH), Value(DASH))
    assert block("Brier ↓")["MLE"] == (Value(), Value(), Value())
    assert render_grid(grid_tables([record("MLE", 1)]))


def test_of_two_records_of_a_seed_the_later_one_counts():
    (table,) = grid_tables([record("MLE", 1, nll=1.0), record("MLE", 1, nll=3.0)])
    assert dict(table.blocks[2].rows)["MLE"] == (Value("3.000"),)
    assert table.caption.endswith("one seed")


def test_models_have_tables_of_their_own():
    other = {**record("MLE", 1, nll=1.0), "model": "other"}
    assert [table.caption.split(" · ")[0] for table in grid_tables([*RECORDS, other])] == [
        "tiny_model",
        "other",
    ]


def test_text():
    lines = render_grid(grid_tables(RECORDS)).split("\n")
    assert re.split(r"\s{2,}", lines[2]) == [
        "Metric",
        "Method",
        "arc_easy (n=10)",
        "openbookqa (n=20)",
        "openbookqa → arc_easy (n=10)",
    ]
    assert re.split(r"\s{2,}", lines[4]) == ["ACC % ↑", "MLE", "55.0 ± 7.1*", "30.0 (1)", "–"]
    assert re.split(r"\s{2,}", lines[6].strip()) == ["BLoB N=10", "40.0 (1)+", "–", "20.0 (1)"]
    assert lines[-1] == "* best, + runner-up"


def test_markdown_has_as_many_cells_in_every_line():
    text = render_grid(grid_tables([*RECORDS, record("a|b", 1, nll=5.0)]), "markdown")
    lines = [line for line in text.split("\n") if line.startswith("|")]
    assert {len(re.split(r"(?<!\\)\|", line)) for line in lines} == {7}
    assert "| **55.0** ± 7.1 | 30.0 (1) | – |" in text
    assert "<u>0.800</u> ± 0.141" in text


def test_latex_is_balanced_and_escaped():
    text = render_grid(grid_tables([*RECORDS, record("50% & {more}_$#~^\\", 1, nll=5.0)]), "latex")
    for opening in ("table", "tabular"):
        assert text.count(rf"\begin{{{opening}}}") == text.count(rf"\end{{{opening}}}") == 1
    bare = re.sub(r"\\[{}]", "", text)
    assert bare.count("{") == bare.count("}")
    assert re.sub(r"\\\$", "", text).count("$") % 2 == 0
    lines = [line for line in text.split("\n") if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {4}
    assert all(rule in text for rule in (r"\toprule", r"\midrule", r"\bottomrule"))
    assert r"\textbf{55.0}$_{\pm7.1}$" in text
    assert r"\underline{0.800}" in text
    assert r"arc\_easy" in text
    assert not re.search(r"(?<!\\)[%#_](?!\{)", "\n".join(text.split("\n")[1:]))


def test_every_special_character_is_escaped():
    assert escaped("a_b & 3 % {x} ~ ^ \\ → –") == (
        r"a\_b \& 3 \% \{x\} \textasciitilde{} \textasciicircum{} \textbackslash{} $\to$ --"
    )


def test_an_unknown_style_is_refused():
    with pytest.raises(
        ValueError,
        match="got the style 'html'; expected one of .'latex', 'markdown', 'text'.; choose",
    ):
        render_grid(grid_tables(RECORDS), "html")


def test_no_records_are_refused():
    with pytest.raises(ValueError, match="got no records"):
        grid_tables([])


# Significance


def kept(folder, label, seed, confidences, **more):
    """A record with a file of rows that give the right option these probabilities."""
    name = f"{label}-{seed}.jsonl"
    rows = [
        {"id": f"q{i}", "answer": i % 2, "probabilities": [p, 1 - p] if i % 2 == 0 else [1 - p, p]}
        for i, p in enumerate(confidences)
    ]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    nll = sum(-math.log(p) for p in confidences) / len(confidences)
    return {**record(label, seed, n=len(rows), nll=nll, **more), "predictions": name}


def test_a_difference_on_every_question_is_significant_and_equal_methods_are_not(tmp_path):
    good, bad = [0.7 + 0.01 * (i % 5) for i in range(40)], [0.6 - 0.01 * (i % 5) for i in range(40)]
    records = [
        record_
        for seed in (1, 2)
        for record_ in (
            kept(tmp_path, "good", seed, good),
            kept(tmp_path, "bad", seed, bad),
            kept(tmp_path, "same", seed, good),
        )
    ]
    bad_one, same = significance(records, tmp_path, resamples=200)
    assert (bad_one["label"], bad_one["against"], bad_one["seeds"]) == ("bad", "good", [1, 2])
    assert bad_one["nll"]["p_value"] == bad_one["brier"]["p_value"] == pytest.approx(1 / 201)
    assert 0 < bad_one["nll"]["low"] < bad_one["nll"]["difference"] < bad_one["nll"]["high"]
    assert bad_one["accuracy"]["p_value"] == 1.0  # all are right
    assert {same[metric]["p_value"] for metric in ("nll", "brier", "accuracy")} == {1.0}
    json.dumps([bad_one, same])


def test_seeds_that_differ_to_either_side_cancel_within_a_question(tmp_path):
    """Averaged over seeds there is no difference at any question: p is 1, though each seed differs everywhere."""
    low, high = [0.6] * 30, [0.8] * 30
    records = [kept(tmp_path, "one", 1, low), kept(tmp_path, "one", 2, high)]
    records += [kept(tmp_path, "two", 1, high), kept(tmp_path, "two", 2, low)]
    (found,) = significance(records, tmp_path, resamples=50)
    assert found["nll"]["difference"] == pytest.approx(0, abs=1e-12)
    assert found["nll"]["p_value"] == 1.0


def test_only_shared_seeds_and_questions_are_compared(tmp_path):
    records = [kept(tmp_path, "one", 1, [0.9] * 8), kept(tmp_path, "one", 2, [0.9] * 8)]
    records += [kept(tmp_path, "two", 2, [0.5] * 6), kept(tmp_path, "alone", 3, [0.4] * 8)]
    (found,) = significance(records, tmp_path, resamples=20)
    assert (found["label"], found["seeds"], found["nll"]["n"]) == ("two", [2], 6)
    (table,) = grid_tables(records[:2] + [{**r, "n": 8} for r in records[2:]], tmp_path, 20)
    p = dict(next(b for b in table.blocks if b.title == "p (NLL)").rows)
    assert p == {"one": (Value("best"),), "two": (Value("0.048"),), "alone": (Value(),)}
    assert "20 resamples" in table.notes[-1]


def test_another_method_than_the_best_can_be_compared_with(tmp_path):
    records = [kept(tmp_path, "good", 1, [0.8] * 9), kept(tmp_path, "bad", 1, [0.4] * 9)]
    (table,) = grid_tables(records, tmp_path, 20, against="bad")
    nll = dict(next(b for b in table.blocks if b.title == "NLL less bad's").rows)
    assert nll == {"good": (Value("−0.693, p 0.048"),), "bad": (Value("–"),)}
    accuracy = dict(next(b for b in table.blocks if b.title == "ACC % less bad's").rows)
    assert accuracy["good"] == (Value("+100.0, p 0.048"),)
    assert "against bad," in table.notes[-1]
    with pytest.raises(ValueError, match=r"got 'MLE', expected one of \['good', 'bad'\]"):
        grid_tables(records, tmp_path, 20, against="MLE")


def test_without_rows_there_is_nothing_to_compare(tmp_path):
    assert significance(RECORDS, tmp_path) == []
    assert significance([record("MLE", 1)], tmp_path) == []
