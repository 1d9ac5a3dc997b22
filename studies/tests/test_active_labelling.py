"""Active labelling: rounds grow by what was picked, the file goes on, the table is of it."""

from dataclasses import replace

import pytest

from bayestune.whole_files import read_json_lines
from studies import active_labelling as study
from tests.hub_files import write_arc, write_model


@pytest.fixture
def session(llama, byte_level, tmp_path, monkeypatch):
    sizes = {"POOL": 20, "TEMPERATURE_ROWS": 4, "STEP": 5, "ROUNDS": 3, "TEST_ROWS": 4, "DRAWS": 2}
    for name, value in sizes.items():
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(study, "TRAINING", replace(study.TRAINING, steps=1, bf16=False))
    model = write_model(tmp_path / "model", llama(), byte_level)
    return study.opened("arc_easy", str(model), write_arc(tmp_path / "data", 24))


def test_rounds_grow_and_go_on(session, tmp_path):
    path = tmp_path / "records.jsonl"
    cells = [study.Cell("arc_easy", 1, arm) for arm in study.ARMS]
    study.run(cells[:1], {"arc_easy": session}, path)
    first = read_json_lines(path)
    study.run(cells, {"arc_easy": session}, path)
    records = read_json_lines(path)
    assert records[:3] == first
    assert [record["labels"] for record in records] == [5, 10, 15] * 4
    for cell in cells:
        picked = [name for record in cell.own(records) for name in record["picked"]]
        assert len(set(picked)) == len(picked) == 10
    by_arm = {cell.arm: cell.own(records) for cell in cells}
    for rule, chance in (("BLoB, BALD", "BLoB, random"), ("MLE + T, entropy", "MLE + T, random")):
        assert by_arm[rule][0]["figures"] == by_arm[chance][0]["figures"]
    picks = [[r["picked"] for r in by_arm[arm]] for arm in ("BLoB, random", "MLE + T, random")]
    assert picks[0] == picks[1]  # the methods differ, the rows do not
    text = study.table(records)
    assert "| MLE + T, entropy | " in text
    assert "not enough seeds yet" in text
    other = [{**record, "seed": 2} for record in records]
    assert "standard error over 2 seeds" in study.table(records + other)
