"""The shift tables by hand, what is missing, what is refused."""

import pytest
from recorded import record, row, with_rows

from bayestune.report import has_shift, shift, write_shift

FAMILIAR = [row(0, [0.9, 0.1], 0, 0.1), row(1, [0.8, 0.2], 1, 0.1), row(2, [0.7, 0.3], 0, 0.2)]
SHIFTED = [row(0, [0.65, 0.35], 1, 0.3), row(1, [0.85, 0.15], 0, 0.15)]


def evaluated(folder, label, task, seed, rows, accuracy=0.5, **fields):
    """A method trained on OpenBookQA."""
    known = {"accuracy": accuracy, "ece": accuracy / 10, "nll": 2 * accuracy}
    fields = {"task": task, "trained_on": "openbookqa", **known, **fields}
    return with_rows(folder, rows, label, seed, **fields)


@pytest.fixture
def records(tmp_path):
    """MLE with two seeds and BLoB with one, in domain and on ARC-C."""
    found = [
        evaluated(tmp_path, "MLE", "openbookqa", 1, FAMILIAR, 0.60),
        evaluated(tmp_path, "MLE", "openbookqa", 2, FAMILIAR, 0.70),
        evaluated(tmp_path, "MLE", "arc_challenge", 1, SHIFTED, 0.40),
        evaluated(tmp_path, "MLE", "arc_challenge", 2, SHIFTED, 0.40),
        evaluated(tmp_path, "BLoB N=10", "openbookqa", 1, FAMILIAR, 0.66),
        evaluated(tmp_path, "BLoB N=10", "arc_challenge", 1, [], 0.30, n=3),
    ]
    (tmp_path / found[-1]["predictions"]).unlink()
    return found


def shown(records, folder):
    """The text written, and (title of the block, method, number of columns) → cells."""
    path = write_shift(records, folder)[0]
    text = path.read_text(encoding="utf-8")
    cells = {}
    title = ""
    for line in text.splitlines():
        if line.startswith("|"):
            first, method, *others = [part.strip() for part in line.strip("|").split(" | ")]
            title = first or title
            cells[title, method, len(others)] = others
    return text, cells


def test_the_tables_by_hand(records, tmp_path):
    text, table = shown(records, tmp_path)
    assert text.splitlines()[0] == (
        "trained on OBQA · tiny · scored by letter · OBQA 3, ARC-C 2 or 3 rows · "
        "ECE in 15 bins (textbook)"
    )
    assert "\nMean ± standard deviation over 2 seeds; (k): of k seeds only. –: no rows" in text
    assert table["Metric", "Method", 2] == ["OBQA (in domain)", "ARC-C (small shift)"]
    assert table["ACC % ↑", "MLE", 2] == ["65.0 ± 7.1", "40.0 ± 0.0"]
    assert table["ACC % ↑", "BLoB N=10", 2] == ["66.0 (1)", "30.0 (1)"]
    assert table["ECE % ↓", "MLE", 2] == ["6.5 ± 0.7", "4.0 ± 0.0"]
    assert table["ECE % ↓", "BLoB N=10", 2] == ["6.6 (1)", "3.0 (1)"]
    assert table["NLL ↓", "BLoB N=10", 2] == ["1.320 (1)", "0.600 (1)"]
    # Errors in domain: the wrong row's doubt 0.2 is between 0.1 and 0.3; its mutual information
    # ties with 0.1.
    assert table["1 − confidence", "MLE", 2] == ["50.0 ± 0.0", "100.0 ± 0.0"]
    assert table["total entropy", "BLoB N=10", 2] == ["50.0 (1)", "–"]
    assert table["mutual information", "MLE", 2] == ["25.0 ± 0.0", "100.0 ± 0.0"]
    # In-domain or not: doubts 0.35 and 0.15 against 0.1, 0.2, 0.3: of six pairs four in order.
    # A mutual information of 0.3 beats all, 0.15 two of 0.1, 0.1, 0.2.
    assert table["1 − confidence", "MLE", 1] == ["66.7 ± 0.0"]
    assert table["mutual information", "MLE", 1] == ["83.3 ± 0.0"]
    assert table["mutual information", "BLoB N=10", 1] == ["–"]


def test_the_best_of_as_many_seeds_is_marked(records, tmp_path):
    _, table = shown([records[0], records[4]], tmp_path)
    assert table["ACC % ↑", "BLoB N=10", 1] == ["**66.0**"]
    assert table["ACC % ↑", "MLE", 1] == ["60.0"]


def test_one_seed_has_no_spread_and_one_method_no_best(records, tmp_path):
    text, table = shown([records[0], records[2]], tmp_path)
    assert "\nOne seed. –:" in text
    assert table["ACC % ↑", "MLE", 2] == ["60.0", "40.0"]


def test_columns_are_in_order_of_the_shift_and_other_tasks_come_last(records, tmp_path):
    tasks = ["boolq", "mmlu_physics", "arc_easy", "mmlu_chemistry"]
    more = [evaluated(tmp_path, "MLE", task, 1, SHIFTED) for task in tasks]
    _, table = shown([*more, *records], tmp_path)
    heads = table["Score", "Method", 5]
    assert [head.split(" (")[0] for head in heads] == ["ARC-C", "ARC-E", "Chem", "Phy", "boolq"]
    assert heads[2:] == ["Chem (large shift)", "Phy (large shift)", "boolq (shifted)"]


def test_all_right_or_no_draws_to_differ_is_a_dash(tmp_path):
    rows = [row(i, [0.9 - i / 10, 0.1 + i / 10], 0) for i in range(3)]
    _, table = shown([evaluated(tmp_path, "MLE", "openbookqa", 1, rows)], tmp_path)
    assert table["total entropy", "MLE", 1] == ["–"]  # all right
    rows[0]["answer"] = 1
    _, table = shown([evaluated(tmp_path, "MLE", "openbookqa", 1, rows)], tmp_path)
    assert table["total entropy", "MLE", 1] == ["0.0"]
    assert table["mutual information", "MLE", 1] == ["–"]


def test_without_in_domain_rows_of_the_same_seed_there_is_a_dash(records, tmp_path):
    records[0]["predictions"] = "gone.jsonl"
    _, table = shown(records[:4], tmp_path)
    assert table["1 − confidence", "MLE", 1] == ["66.7 (1)"]
    assert table["1 − confidence", "MLE", 2] == ["50.0 (1)", "100.0 ± 0.0"]
    _, table = shown(records[2:4], tmp_path)
    assert table["1 − confidence", "MLE", 1] == ["–"]


def test_a_later_record_takes_the_place_of_an_earlier_one(records, tmp_path):
    again = evaluated(tmp_path, "MLE", "openbookqa", 2, FAMILIAR, 0.80)
    _, table = shown([*records, again], tmp_path)
    assert table["ACC % ↑", "MLE", 2][0] == "70.0 ± 14.1"


def test_models_have_their_own_tables(records, tmp_path):
    text, _ = shown([*records, {**records[0], "model": "large"}], tmp_path)
    assert text.count("trained on OBQA") == 2
    assert "trained on OBQA · large · scored by letter · OBQA 3 rows" in text


def test_records_of_another_training_set_are_left_out(records, tmp_path):
    away = record("MLE", task="openbookqa", trained_on="arc_easy", accuracy=0.1)
    own = record("MLE", task="arc_easy", accuracy=0.1)
    assert shown([away, *records, own], tmp_path) == shown(records, tmp_path)
    assert has_shift(records)
    assert not has_shift([*records[:2], away, own])
    for left, number in (([away, own], 2), ([], 0)):
        match = f"got no records of methods trained on 'openbookqa' among {number}; expected some"
        with pytest.raises(ValueError, match=match + "; run `bayestune bench` with this task"):
            write_shift(left, tmp_path)


def test_the_picture_is_written_only_with_rows(records, tmp_path):
    written = write_shift(records, tmp_path)
    assert [path.name for path in written] == ["shift.md", "risk_coverage.png"]
    assert written[1].read_bytes()[:4] == b"\x89PNG"
    bare = tmp_path / "bare"
    bare.mkdir()
    assert write_shift(records, bare) == [bare / "shift.md"]


def test_two_models_share_the_picture_and_not_a_panel(records, tmp_path, monkeypatch):
    seen = []
    draw = shift.risk_coverage_figure
    monkeypatch.setattr(shift, "risk_coverage_figure", lambda p: seen.append(p) or draw(p))
    write_shift([*records, {**records[0], "model": "large"}], tmp_path)
    assert list(seen[0]) == [
        "tiny · OBQA (in domain)",
        "tiny · ARC-C (small shift)",
        "large · OBQA (in domain)",
    ]
    runs = seen[0]["tiny · OBQA (in domain)"]
    assert {name: len(rows) for name, rows in runs.items()} == {"MLE": 2, "BLoB N=10": 1}
