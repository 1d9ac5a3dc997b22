"""JSON lines, in a file."""

from pathlib import Path

import pytest

from bayestune.jsonl import read_json_lines, write_json_lines

ROWS = [{"text": "é\u2028ü", "path": Path("a") / "b"}, {"n": 1}]
READ = [{"text": "é\u2028ü", "path": "a/b"}, {"n": 1}]


def test_what_is_written_is_read(tmp_path):
    write_json_lines(tmp_path / "written", ROWS)
    assert read_json_lines(tmp_path / "written") == READ
    assert [path.name for path in tmp_path.iterdir()] == ["written"]


def test_a_row_that_json_cannot_hold_changes_nothing(tmp_path):
    path = tmp_path / "rows"
    write_json_lines(path, ROWS)
    with pytest.raises(TypeError, match="object"):
        write_json_lines(path, [{"n": 2}, {"n": object()}])
    assert read_json_lines(path) == READ


@pytest.mark.parametrize(
    ("bad", "what"), [('{"question": ', "Expecting value"), ("[1, 2]", "got a list")]
)
def test_a_bad_line_is_named_by_its_number(tmp_path, bad, what):
    path = tmp_path / "own.jsonl"
    path.write_text(f'\ufeff{{"text": "a\u2028b"}}\n\n{bad}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=rf"own\.jsonl, line 3: not a JSON object \({what}"):
        read_json_lines(path)


def test_a_missing_file_has_no_rows_if_it_may_be_missing(tmp_path):
    assert read_json_lines(tmp_path / "none", missing_ok=True) == []
    with pytest.raises(FileNotFoundError):
        read_json_lines(tmp_path / "none")
