"""results/method_comparison is what the records give today, and PEFT reads its settings."""

import json
from pathlib import Path

import pytest
from peft import LoraConfig

from bayestune.evaluation import read_records
from studies.method_comparison import NAMES, OUTPUT, RECORDS, main


def files(folder):
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_text("utf-8") for path in paths}


def test_the_folder_is_up_to_date(tmp_path):
    main(["--output", str(tmp_path)])
    assert files(tmp_path) == files(OUTPUT)


def test_the_results_are_the_records():
    records = {record["label"]: record for record in read_records(RECORDS)}
    assert set(NAMES) <= set(records)
    for label, name in NAMES.items():
        path = OUTPUT / "results" / f"{name.replace('/', '--')}.json"
        told = json.loads(path.read_text(encoding="utf-8"))
        (metrics,) = told["train_info"]["metrics"]
        for metric in ("accuracy", "nll", "brier"):
            value = records[label]["metrics"][metric]["value"]
            assert metrics[f"test {metric}"] == pytest.approx(value)
        assert told["run_info"]["experiment_name"] == name
        assert told["train_info"]["accelerator_memory_max"] is None
        assert set(told) == {"run_info", "train_info", "meta_info"}


@pytest.mark.parametrize("name", NAMES.values())
def test_peft_reads_the_settings(name):
    config = LoraConfig.from_pretrained(OUTPUT / "experiments" / name)
    assert (config.r, config.lora_alpha) == (8, 16)
    assert config.target_modules == {"q_proj", "v_proj"}
    path = Path(OUTPUT, "experiments", name, "training_params.json")
    told = json.loads(path.read_text(encoding="utf-8"))
    assert told["optimizer_kwargs"]["lr"] == 1e-3


def test_the_page_names_no_figure_of_a_gpu():
    text = (OUTPUT / "README.md").read_text(encoding="utf-8")
    for name in NAMES.values():
        assert f"`{name}`" in text
    assert "What is not" in text
