"""Settings and results in the form of PEFT's `method_comparison`, from the records of a run.

    python -m studies.method_comparison            # writes results/method_comparison

A folder of `experiments/<method>/<name>/` with `adapter_config.json` and `training_params.json`,
and a JSON file of results for each, named `<method>--<name>.json` as PEFT's `run.py` does. What was
not measured is null.
"""

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bayestune.evaluation import read_records
from bayestune.report import renewed

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "results/demo"
OUTPUT = ROOT / "results/method_comparison"
# PEFT's folders are named after its types; both of ours are LoRA adapters when they are used
NAMES = {
    "MLE": "lora/smollm2-135M-rank8",
    "MLE + temperature": "lora/smollm2-135M-rank8-temperature",
    "BLoB N=0": "blob/smollm2-135M-rank8-mean",
    "BLoB N=10": "blob/smollm2-135M-rank8-draws10",
    "Student of BLoB": "blob/smollm2-135M-rank8-student",
}
_METRICS = ("accuracy", "nll", "brier", "ece", "ece_if_calibrated", "aurc")
_PACKAGES = ("transformers", "peft", "torch", "accelerate")


def adapter_config(record: Mapping[str, Any]) -> dict[str, Any]:
    """What `LoraConfig.save_pretrained` keeps that the record knows."""
    lora = record["config"]["training"]["lora"]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": lora["rank"],
        "lora_alpha": lora["alpha"],
        "lora_dropout": lora["dropout"],
        "target_modules": lora["targets"],
        "bias": "none",
        "base_model_name_or_path": None,
    }


def training_params(record: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of `method_comparison`'s training, as far as the run has them, and ours."""
    config = record["config"]
    training = config["training"]
    method = {key: value for key, value in config["method"].items() if key != "method"}
    return {
        "model_id": record["model"],
        "dtype": config["dtype"],
        "max_seq_length": config["questions"]["max_length"],
        "batch_size": training["batch_size"],
        "batch_size_eval": config["predicting"]["prediction_batch"],
        "max_steps": training["steps"],
        "seed": training["seed"],
        "grad_norm_clip": training["max_grad_norm"],
        "optimizer_type": "AdamW",
        "optimizer_kwargs": {
            "lr": training["learning_rate"],
            "weight_decay": training["weight_decay"],
        },
        "use_amp": config["bf16"],
        "bayestune_warmup_ratio": training["warmup_ratio"],
        "bayestune_method": config["method"]["method"],
        "bayestune_settings": method,
        "bayestune_draws": record["draws"],
        "bayestune_scoring": record["scoring"],
    }


def result(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A result in the form of `method_comparison`; null for what was not measured."""
    losses = [line for line in record.get("fit", {}).get("history", []) if "loss" in line]
    last: dict[str, Any] = {"step": losses[-1]["step"] if losses else None}
    last["train loss"] = losses[-1]["loss"] if losses else None
    training = record["config"]["training"]
    rows_of_a_step = training["batch_size"] * training["accumulation"]
    last["train samples"] = losses[-1]["step"] * rows_of_a_step if losses else None
    for metric in _METRICS:
        found = record["metrics"].get(metric)
        if found is not None:
            last[f"test {metric}"] = found["value"]
            interval = {key: found[key] for key in ("low", "high", "n") if key in found}
            last[f"test {metric} interval"] = interval
    versions = record["versions"]
    packages = {f"{package}-version": versions.get(package) for package in _PACKAGES}
    unmeasured = ("accelerator_memory_reserved_avg", "accelerator_memory_max")
    unmeasured += ("accelerator_memory_reserved_99th", "file_size", "num_trainable_params")
    seconds = record["seconds"]
    return {
        "run_info": {
            "created_at": record["date"],
            "total_time": round(seconds["fit"] + seconds["predict"], 1),
            "experiment_name": name,
            "peft_branch": None,
            "train_config": training_params(record),
            "peft_config": adapter_config(record),
            "error_msg": "",
        },
        "train_info": {
            **dict.fromkeys(unmeasured),
            "train_time": seconds["fit"],
            "status": "success",
            "metrics": [last],
        },
        "meta_info": {
            "model_info": {"sha": None, "created_at": None},
            "dataset_info": {record["task"]: {"sha": None, "created_at": None}},
            "package_info": {**packages, "bayestune-version": versions["bayestune"]},
            "system_info": {"accelerator": None},
            "bayestune_revision": record["revision"],
            "peak_process_memory_mb": record["peak_memory_mb"],
        },
    }


def page(records: Sequence[Mapping[str, Any]]) -> str:
    """The README: a table of what stands in the results, and what is not measured."""
    first = records[0]
    heads = ("Experiment", "Method", "ACC %", "NLL", "Brier", "ECE %", "fit s", "predict s")
    lines = [f"| {' | '.join(heads)} |", f"| --- | --- |{' ---: |' * 6}"]
    for record in records:
        metrics = record["metrics"]
        cells = [f"`{NAMES[record['label']]}`", record["label"]]
        for name, scale, digits in (
            ("accuracy", 100, 1),
            ("nll", 1, 3),
            ("brier", 1, 3),
            ("ece", 100, 1),
        ):
            ends = (metrics[name][end] * scale for end in ("value", "low", "high"))
            value, low, high = (f"{end:.{digits}f}" for end in ends)
            cells.append(f"{value} [{low}, {high}]")
        cells += [f"{record['seconds'][part]:.0f}" for part in ("fit", "predict")]
        lines.append(f"| {' | '.join(cells)} |")
    table = "\n".join(lines)
    return _PAGE.format(table=table, **{name: first[name] for name in _ON_THE_PAGE})


_ON_THE_PAGE = ("model", "task", "n", "train_rows", "seed")
_PAGE = """# In the form of PEFT's method comparison

LoRA, BLoB and BLoB's student side by side, laid out as `method_comparison` of
[huggingface/peft](https://github.com/huggingface/peft/tree/main/method_comparison): settings in
`experiments/<method>/<name>/`, a result in `results/<method>--<name>.json`. All of it is rendered
from the records in `results/demo` by `python -m studies.method_comparison`; a test compares.

{table}

In brackets: 95 % intervals over the rows. The model is `{model}`, trained on {train_rows} rows of
the task `{task}` and tested on {n} others; one seed ({seed}). The temperature saw further labelled
rows, and the student further rows without labels ([the demo](../../docs/demo.md)).

**What is measured**: accuracy and calibration on held-out questions with options; seconds of the
fit and of the prediction on one busy core; the peak memory of the process
(`peak_process_memory_mb`).

**What is not**: anything on a GPU, file sizes, numbers of parameters, hashes of models and data:
null in the results. The task is not MetaMathQA, so no figure here compares with those of PEFT's
runs on it. `blob` is not one of PEFT's types: an experiment of it is a LoRA adapter
(`adapter_config.json`) and the settings of its training (`bayestune_settings`). PEFT loads the mean
and the student as they are, and each draw after `bayestune export`.

To offer it there: copy `experiments/lora` and `experiments/blob` into a task of
`method_comparison`, and set `model_id` and the training parameters to that task's. The fields named
`bayestune_…` are for a `run.py` that trains with bayestune; its `TrainConfig` has no such fields.
"""


def write(output: Path) -> None:
    """Writes the whole folder anew."""
    records = [one for one in renewed(read_records(RECORDS), RECORDS) if one["label"] in NAMES]
    for part in ("experiments", "results"):
        shutil.rmtree(output / part, ignore_errors=True)
    for record in records:
        name = NAMES[record["label"]]
        folder = output / "experiments" / name
        _write(folder / "adapter_config.json", adapter_config(record))
        _write(folder / "training_params.json", training_params(record))
        _write(output / "results" / f"{name.replace('/', '--')}.json", result(record, name))
    (output / "README.md").write_text(page(records), encoding="utf-8")


def _write(path: Path, facts: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    write(parser.parse_args(arguments).output)


if __name__ == "__main__":
    main()
