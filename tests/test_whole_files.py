"""Files written whole or not at all, and JSON lines."""

from pathlib import Path

import pytest

from bayestune.whole_files import read_json_lines, replaced, write_json_lines, write_text_whole

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


def test_a_file_that_is_written_takes_the_place_of_the_old_one(tmp_path):
    path = tmp_path / "facts.json"
    for text in ("old", "né\u2028w"):
        write_text_whole(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert list(tmp_path.iterdir()) == [path]


def test_one_that_is_cut_off_leaves_the_old_one_and_no_part(tmp_path):
    path = tmp_path / "facts.json"
    write_text_whole(path, "old")

    def cut_off():
        with replaced(path) as scratch:
            scratch.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut_off()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
