from dataclasses import replace

import pytest

from benching import grid, write_rows


@pytest.fixture
def place(tmp_path, llama, byte_level):
    """A folder with a model and the rows of two tasks."""
    llama().save_pretrained(tmp_path / "model")
    byte_level.save_pretrained(tmp_path / "model")
    write_rows(tmp_path)
    return tmp_path


@pytest.fixture
def small(place):
    """Makes a grid of one task and one seed."""

    def make(**changes):
        whole = grid(place)
        return replace(whole, tasks={"one": whole.tasks["one"]}, seeds=(1,), **changes)

    return make
