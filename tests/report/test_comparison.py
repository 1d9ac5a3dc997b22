"""The paper's table, by hand, and its p-values."""

import math

import pytest
from recorded import record, row, with_rows

from bayestune.report import grid_tables, render, significance
from bayestune.report.table import Cell

OBQA = {"task": "openbookqa", "trained_on": "openbookqa", "n": 20}
RECORDS = [
    record("MLE", 1, accuracy=0.50, nll=1.0, ece=0.30),
    record("MLE", 2, accuracy=0.60, nll=1.4, ece=0.20),
    record("BLoB N=0", 1, accuracy=0.55, nll=0.7, ece=0.1),
    record("BLoB N=0", 2, accuracy=0.55, nll=0.9, ece=0.1),
    record("BLoB N=10", 1, accuracy=0.40, nll=0.6, ece=0.2),
    record("MLE", 1, accuracy=0.3, nll=2.0, **OBQA),
    record("BLoB N=10", 1, accuracy=0.2, trained_on="openbookqa"),
]


def block(title, records=RECORDS, *how, **options):
    (table,) = grid_tables(records, *how, **options)
    (found,) = [block for block in table.blocks if block.title == title]
    return dict(found.lines)


def test_mean_and_standard_deviation_over_seeds():
    (table,) = grid_tables(RECORDS)
    assert table.columns == (
        "arc_easy (n=10)",
        "openbookqa (n=20)",
        "openbookqa → arc_easy (n=10)",
    )
    assert table.caption == (
        "tiny · scored by letter · ECE in 15 bins (textbook) · "
        "mean ± standard deviation over 2 seeds"
    )
    # Standard deviations with n − 1: 10/√2, 0.4/√2, 0.2/√2.
    nll = block("NLL ↓")
    accuracy = (Cell("55.0", ("± 7.1",)), Cell("30.0", ("(1)",)), Cell())
    assert block("ACC % ↑")["MLE"] == accuracy
    assert nll["MLE"][0] == Cell("1.200", ("± 0.283",), "second")
    assert nll["BLoB N=0"][0] == Cell("0.800", ("± 0.141",), "best")


def test_the_mean_of_fewer_seeds_is_not_ranked_among_those_of_more():
    lower = block("NLL ↓")["BLoB N=10"][0]
    assert lower == Cell("0.600", ("(1)",))
    (table,) = grid_tables(RECORDS)
    assert "among the methods with its most seeds" in table.notes[0]


def test_equal_as_printed_is_equally_good_and_one_alone_is_not_marked():
    figures = {"MLE": (0.55, 0.25), "BLoB N=0": (0.5501, 0.10), "BLoB N=10": (0.4, 0.20)}
    records = [record(name, 1, accuracy=a, ece=e) for name, (a, e) in figures.items()]
    accuracy = [line[0].mark for line in block("ACC % ↑", records).values()]
    assert accuracy == ["best", "best", "second"]
    ece = [(line[0].number, line[0].mark) for line in block("ECE % ↓", records).values()]
    assert ece == [("25.0", ""), ("10.0", "best"), ("20.0", "second")]
    assert block("NLL ↓")["MLE"][1].mark == ""


def test_what_is_missing_is_a_dash():
    assert block("NLL ↓")["BLoB N=0"][1:] == (Cell(), Cell())
    assert block("Brier ↓")["MLE"] == (Cell(), Cell(), Cell())
    assert render(grid_tables([record("MLE", 1)]))


def test_of_two_records_of_a_seed_the_later_one_counts():
    records = [record("MLE", 1, nll=1.0), record("MLE", 1, nll=3.0)]
    assert block("NLL ↓", records)["MLE"] == (Cell("3.000"),)
    assert grid_tables(records)[0].caption.endswith("one seed")


def test_models_have_tables_of_their_own():
    tables = grid_tables([*RECORDS, record("MLE", 1, model="other", nll=1.0)])
    assert [table.caption.split(" · ")[0] for table in tables] == ["tiny", "other"]


def test_no_records_are_refused():
    with pytest.raises(ValueError, match="got no records"):
        grid_tables([])


# p-values


def kept(folder, label, seed, confidences):
    """A record whose rows give the right option these probabilities."""
    rows = []
    for i, p in enumerate(confidences):
        rows.append(row(i, [p, 1 - p] if i % 2 == 0 else [1 - p, p], i % 2))
    nll = sum(-math.log(p) for p in confidences) / len(confidences)
    return with_rows(folder, rows, label, seed, nll=nll, n=8)


def test_a_sure_difference_is_significant_and_equal_methods_are_not(tmp_path):
    good = [0.7 + 0.01 * (i % 5) for i in range(40)]
    bad = [0.6 - 0.01 * (i % 5) for i in range(40)]
    records = []
    for seed in (1, 2):
        records.append(kept(tmp_path, "good", seed, good))
        records.append(kept(tmp_path, "bad", seed, bad))
        records.append(kept(tmp_path, "same", seed, good))
    found = significance(records, tmp_path, "good", resamples=200)
    assert list(found) == ["bad", "same"]
    nll = found["bad"]["nll"]
    assert nll.p_value == found["bad"]["brier"].p_value == pytest.approx(1 / 201)
    assert 0 < nll.low < nll.difference < nll.high
    assert found["bad"]["accuracy"].p_value == 1.0  # all are right
    assert {paired.p_value for paired in found["same"].values()} == {1.0}


def test_seeds_that_differ_to_either_side_cancel_within_a_question(tmp_path):
    """Averaged over seeds no question differs: p is 1, though each seed differs everywhere."""
    records = [kept(tmp_path, "one", 1, [0.6] * 30), kept(tmp_path, "one", 2, [0.8] * 30)]
    records += [kept(tmp_path, "two", 1, [0.8] * 30), kept(tmp_path, "two", 2, [0.6] * 30)]
    found = significance(records, tmp_path, "one", resamples=50)["two"]["nll"]
    assert found.difference == pytest.approx(0, abs=1e-12)
    assert found.p_value == 1.0


def test_only_shared_seeds_and_questions_are_compared(tmp_path):
    records = [kept(tmp_path, "one", 1, [0.8] * 8), kept(tmp_path, "one", 2, [0.9] * 8)]
    records += [kept(tmp_path, "two", 2, [0.5] * 6), kept(tmp_path, "alone", 3, [0.4] * 8)]
    found = significance(records, tmp_path, "one", resamples=20)
    assert list(found) == ["two"]
    assert found["two"]["nll"].n == 6
    assert found["two"]["nll"].difference == pytest.approx(math.log(0.9 / 0.5))
    half = [*records, {**records[2], "seed": 1, "predictions": "gone"}]
    assert significance(half, tmp_path, "one", resamples=20) == found
    p = block("p (NLL)", records, tmp_path, 20)
    assert p == {"one": (Cell("best"),), "two": (Cell("0.048"),), "alone": (Cell(),)}
    assert "20 resamples" in grid_tables(records, tmp_path, 20)[0].notes[-2]
    assert len(grid_tables(records, tmp_path, 0)[0].blocks) == 6


def test_another_method_than_the_best_can_be_compared_with(tmp_path):
    records = [kept(tmp_path, "good", 1, [0.8] * 9), kept(tmp_path, "bad", 1, [0.4] * 9)]
    nll = block("NLL less bad's", records, tmp_path, 20, against="bad")
    assert nll == {"good": (Cell("−0.693, p 0.048, better"),), "bad": (Cell(),)}
    accuracy = block("ACC % less bad's", records, tmp_path, 20, against="bad")
    assert accuracy["good"] == (Cell("+100.0, p 0.048, better"),)
    assert "against bad," in grid_tables(records, tmp_path, 20, "bad")[0].notes[-2]
    with pytest.raises(ValueError, match=r"no record of 'MLE'; expected one of \['good', 'bad'\]"):
        grid_tables(records, tmp_path, 20, against="MLE")


def test_p_values_are_corrected_for_the_methods_of_a_column(tmp_path):
    records = [kept(tmp_path, "good", 1, [0.8] * 9)]
    records += [kept(tmp_path, name, 1, [0.4] * 9) for name in ("bad", "worse")]
    lines = block("NLL less good's", records, tmp_path, 20, against="good")
    assert lines["bad"] == lines["worse"] == (Cell("+0.693, p 0.095, tie"),)  # 2/21 each


def test_a_guess_stands_beside_the_losses(tmp_path):
    records = [kept(tmp_path, "good", 1, [0.8] * 9)]
    (table,) = grid_tables(records, tmp_path, 0)
    titles = [each.title for each in table.blocks]
    assert titles[titles.index("NLL ↓") + 1] == "log C"
    assert block("log C", records, tmp_path, 0) == {"a guess": (Cell("0.693"),)}
    assert "log C" not in [each.title for each in grid_tables(records)[0].blocks]


def test_without_rows_there_is_nothing_to_compare(tmp_path):
    assert significance(RECORDS, tmp_path, "MLE") == {}
    assert significance(RECORDS, tmp_path, None) == {}
    assert block("p (NLL)", RECORDS, tmp_path)["BLoB N=10"] == (Cell(), Cell(), Cell())
