import pytest
from running import own_rows, write_rows


@pytest.fixture
def place(tmp_path, llama, byte_level):
    """A folder with a model, whose answers are not all alike, and rows."""
    llama(initializer_range=0.3).save_pretrained(tmp_path / "model")
    byte_level.save_pretrained(tmp_path / "model")
    write_rows(tmp_path / "train.jsonl", own_rows(8))
    write_rows(tmp_path / "test.jsonl", own_rows(5, start=3))
    write_rows(tmp_path / "ask.jsonl", own_rows(7))
    return tmp_path
