"""docs/formats.md names the fields of what is written."""

import json
import re
from pathlib import Path

import pytest

from running import fitting, furnish, own_rows, read_rows, run, write_rows
from tiny import byte_level_tokenizer, tiny_llama

PAGE = Path(__file__).parents[2] / "docs/formats.md"


def section(heading):
    text = PAGE.read_text(encoding="utf-8").split(f"# {heading}\n")[1]
    return re.split(r"^##", text, maxsplit=1, flags=re.MULTILINE)[0]


def in_the_table(heading):
    """The names in the first column of a section's table."""
    lines = [line for line in section(heading).splitlines() if line.startswith("| `")]
    return {name for line in lines for name in re.findall(r"`([^`]+)`", line.split("|")[1])}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = furnish(tmp_path_factory.mktemp("formats"), tiny_llama(), byte_level_tokenizer())
    run(*fitting(folder))
    write_rows(folder / "held_out.jsonl", own_rows(24, start=100))
    run("calibrate", folder / "out", f"--rows={folder / 'held_out.jsonl'}", "--risk=0.5")
    asked = f"--evaluation_data={write_rows(folder / 'new.jsonl', own_rows(6, start=300))}"
    run("evaluate", f"--posterior={folder / 'out'}", asked, "--draws=[2]", "--uncalibrated")
    return folder / "out"


@pytest.mark.parametrize("name", ["posterior.json", "calibration.json"])
def test_the_fields_of_a_file_are_those_of_the_page(place, name):
    written = json.loads((place / name).read_text(encoding="utf-8"))
    assert in_the_table(name) == set(written)


def test_the_fields_within_a_calibration_are_on_the_page(place):
    written = json.loads((place / "calibration.json").read_text(encoding="utf-8"))
    named = set(re.findall(r"`(\w+)`", section("calibration.json")))
    threshold = next(iter(written["thresholds"].values()))
    assert {*threshold, *written["settings"], *written["baselines"]} <= named


def test_the_files_of_a_folder_are_on_the_page(place):
    made = {path.name for path in place.iterdir()} - {"checkpoints"}
    records = {name for name in made if name.startswith(("records", "rows-"))}
    assert made - records <= in_the_table("A posterior's folder")


def test_a_records_line_and_its_rows_are_on_the_page(place):
    (record,) = read_rows(place / "records.jsonl")
    assert set(record) <= in_the_table("A study's folder")
    rows = read_rows(place / record["predictions"])
    assert set(rows[0]) <= set(re.findall(r"`(\w+)`", section("A study's folder")))
