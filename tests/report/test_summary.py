"""The table of one task: a line a record, only what compares in one table."""

import math
import re

import pytest
from recorded import evaluated, record

from bayestune.report import grid_tables, render, summary_tables
from bayestune.report.class_figures import class_tables
from bayestune.report.comparable import caption, comparable, names


def test_a_line_per_record_with_intervals_and_the_best_marked():
    records = [
        record("MLE", accuracy=0.80, nll=0.9, brier=0.5, ece=0.12, aurc=0.2),
        record("BLoB N=10", accuracy=0.79, nll=0.4, brier=0.3, ece=0.04, aurc=0.2),
    ]
    level = {"value": 0.066, "low": 0.042, "high": 0.093, "n": 10, "p_value": 0.014}
    records[0]["metrics"]["ece_if_calibrated"] = level
    lines = render(summary_tables(records)).splitlines()
    assert lines[0] == "arc_easy · tiny · scored by letter · 10 rows · ECE in 15 bins (textbook)"
    assert re.split(r"  +", lines[2]) == [
        "Method",
        *("ACC % ↑", "ECE % ↓", "ECE if calibrated %", "NLL ↓", "Brier ↓", "AURC ↓"),
    ]
    assert re.split(r"  +", lines[4]) == [
        "MLE",
        *("80.0* [79.0, 81.0]", "12.0 [11.0, 13.0]", "6.6 (4.2–9.3, p 0.014)"),
        *("0.900 [0.890, 0.910]", "0.500 [0.490, 0.510]", "0.200 [0.190, 0.210]"),
    ]
    assert re.split(r"  +", lines[5])[1:] == [
        *("79.0 [78.0, 80.0]", "4.0*", "–"),
        *("0.400* [0.390, 0.410]", "0.300* [0.290, 0.310]", "0.200 [0.190, 0.210]"),
    ]


@pytest.mark.parametrize("style", ["text", "markdown", "html", "latex"])
def test_a_note_says_what_stands_beside_ece(tmp_path, style):
    known = render(summary_tables([evaluated(tmp_path, "MLE")]), style)
    assert "what a perfectly calibrated model with the same confidences would score" in known
    old = render(summary_tables([record("MLE", ece=0.1)]), style)
    assert "calibrated" not in old
    assert "10.0" in old
    assert "[9.0, 11.0]" not in old  # it does not cover


def test_nan_is_a_dash_and_never_the_best():
    records = [record("a", nll=math.nan), record("b", nll=2.0), record("c", nll=3.0)]
    text = render(summary_tables(records), "markdown")
    assert "| a | – | – | – | – | – |" in text
    assert "**2.000**" in text


def test_tables_are_apart_where_values_do_not_compare():
    changes = [{}, {"task": "u"}, {"rows": "evaluation"}, {"bins": 10}, {"rows": "held_out"}]
    changes.append({"n": 7})
    records = [record(str(i), nll=float(i), **more) for i, more in enumerate(changes)]
    zero, task, same, bins, held_out, fewer = records
    assert comparable(records) == [[zero, same], [task], [bins], [held_out], [fewer]]
    across = comparable(records, same_task=False)
    assert across == [[zero, task, same, fewer], [bins], [held_out]]
    text = render(summary_tables(records), "markdown")
    assert text.count("Method") == 5
    assert text.count("**") == 2
    assert "**0.000**" in text


def test_names_tell_records_apart():
    one = record("BLoB", scoring="text", task="t")
    assert names([one]) == ["BLoB"]
    assert names([one, one | {"seed": 2}]) == ["BLoB, seed 1", "BLoB, seed 2"]
    assert names([one, one | {"task": "u"}]) == ["BLoB, t", "BLoB, u"]
    assert names([one, one | {"scoring": "letter"}]) == ["BLoB, by text", "BLoB, by letter"]


def test_a_caption_says_what_is_known():
    assert caption({}) == "ECE in ? bins (binning unknown)"
    assert caption(record("a"), "t", 3, "one seed") == (
        "t · tiny · scored by letter · 3 rows · ECE in 15 bins (textbook) · one seed"
    )


def test_without_records_the_command_is_named():
    remedy = "run `bayestune bench` first"
    with pytest.raises(ValueError, match=f"got no records; expected one for each .*; {remedy}"):
        summary_tables([])


def by_class(names=("red", "green")):
    counts = [[3, 1], [0, 2]]
    figures = []
    for name, precision in zip(names, (1.0, None), strict=True):
        own = {"name": name, "rows": 4, "chosen": 3, "precision": precision, "recall": 0.75}
        figures.append({**own, "f1": 6 / 7, "wrong_at_90": 1})
    return {"classes": figures, "macro_f1": 0.8285, "confusion": counts}


def test_classes_of_each_method_and_what_was_taken_for_what():
    records = [record("MLE", nll=1.0, by_class=by_class()), record("MAP", nll=1.0)]
    figures, confusion = class_tables([*records, record("BLoB", nll=1.0, by_class=by_class())])
    text = render([figures], "markdown")
    assert "| MLE (macro F1 0.829) | red | 4 | 3 | 100.0 | 75.0 | 85.7 | 1 |" in text
    assert "|  | green | 4 | 3 | – | 75.0 | 85.7 | 1 |" in text
    assert "MAP" not in text
    lines = render([confusion], "markdown").splitlines()
    assert lines[2] == "| Method | Right answer | red | green |"
    assert lines[4:] == [
        *("| MLE | red | 3 | 1 |", "|  | green | 0 | 2 |"),
        *("| BLoB | red | 3 | 1 |", "|  | green | 0 | 2 |"),
    ]
    assert class_tables(records[1:]) == []
    others = [*records[:1], record("BLoB", nll=1.0, by_class=by_class(("red", "blue")))]
    assert len(class_tables(others)) == 1  # no one matrix has both


def test_the_tables_of_a_grid_have_its_gate_where_records_do():
    gate = {"wrong_at_90": 3, "coverage_at_risk_5": 0.25, "augrc": 0.1}
    text = render(grid_tables([record("MLE", nll=1.0, gate=gate)]), "markdown")
    assert "| wrong ≥ 0.9 ↓ | MLE | 3 |" in text
    assert "| cov@5 % risk ↑ | MLE | 25.0 |" in text
    assert "acted on" not in text
    assert "wrong ≥" not in render(grid_tables([record("MLE", nll=1.0)]), "markdown")
