"""The simulation of decisions: a cell's figures, a file that goes on, the table."""

from bayestune.whole_files import read_json_lines
from studies import decisions


def test_cells_are_kept_and_go_into_the_table(tmp_path):
    path = tmp_path / "records.jsonl"
    decisions.run(["calibrated", "useless", "drift"], [60, 400], 3, path)
    records = read_json_lines(path)
    assert [(r["model"], r["rows"]) for r in records] == [
        (model, rows) for rows in (60, 400) for model in ("calibrated", "useless", "drift")
    ]
    assert records[0]["refused"] == 3
    assert 0.5 < records[3]["cover"] <= 1
    decisions.run(["calibrated", "drift"], [60], 3, path)
    assert read_json_lines(path) == records
    text = decisions.table(path)
    assert "| calibrated | 60 | 3 | 3 |" in text
    assert text.count("\n| 60 |") == 1
