"""The runs that `test_launch` kills or starts twice, forked from one process that imports once."""

import json
import logging
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bayestune.adapters import Lora
from bayestune.bench import Grid, TaskSettings, run_bench
from bayestune.evaluation import EvaluationOptions
from bayestune.session import TaskOptions
from bayestune.training import Training

OPTIONS = ("red", "green", "blue", "the sky")


def furnish(place: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A folder with a model, the rows of two tasks, and those that both are evaluated on."""
    model.save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    for name, numbers in {"one": range(8), "two": range(20, 28), "test": range(40, 46)}.items():
        lines = []
        for i in numbers:
            row = {"question": f"what is {OPTIONS[i % 4]} and {i}?", "answer": i % 4}
            lines.append(json.dumps({**row, "options": OPTIONS}) + "\n")
        (place / f"{name}.jsonl").write_text("".join(lines))
    return place


def grid(place: Path, **changes: object) -> Grid:
    """Two tasks with rows of their own; the second one is evaluated on the first too."""
    data = {}
    for name in ("one", "two"):
        data[name] = {"data": place / f"{name}.jsonl", "evaluation_data": place / "test.jsonl"}
    two = TaskSettings(questions=data["two"], training={"steps": 3}, evaluate_on=("two", "one"))
    settings = {
        "models": (str(place / "model"),),
        "tasks": {"one": TaskSettings(questions=data["one"]), "two": two},
        "methods": {
            "mle": None,
            "TFB on MLE": {"method": "tfb", "base": "mle"},
            "BLoB, small": {"method": "blob", "final_std": 0.05, "schedule": "constant"},
        },
        "seeds": (1, 2),
        "questions": TaskOptions(holdout=0.25),
        "training": Training(Lora(rank=2), steps=4, batch_size=2, save_steps=1),
        "predicting": EvaluationOptions(draws=(0, 2), resamples=10),
    }
    return Grid(**{**settings, **changes})


def small(place: Path, **changes: object) -> Grid:
    """One task and one seed of it."""
    tasks = {"one": grid(place).tasks["one"]}
    return grid(place, **{"tasks": tasks, "seeds": (1,), **changes})


def bench(place: Path, output: Path, seeds: tuple[int, ...] = (1, 2)) -> int:
    """A run of the grid in a forked process, its log beside `output`; returns the process's id."""
    child = os.fork()
    if child:
        return child
    log = logging.FileHandler(output.with_name(f"{output.name}.log"))
    logging.getLogger("bayestune").addHandler(log)
    os._exit(run_bench(grid(place, seeds=seeds), output))


def kill_often(place: Path, times: int) -> None:
    """Kills a run again and again after a random time, then lets one end."""
    chance = random.Random(0)
    for _ in range(times):
        child = bench(place, place / "killed")
        time.sleep(chance.uniform(0.0, 0.8))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert os.waitpid(bench(place, place / "killed"), 0)[1] == 0


def run_two(place: Path) -> None:
    """Two runs on one folder at the same time."""
    children = [bench(place, place / "both", (1,)) for _ in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.getLogger("bayestune").setLevel(logging.INFO)
    folder = Path(sys.argv[2])
    if sys.argv[1] == "kill":
        kill_often(folder, int(sys.argv[3]))
    else:
        run_two(folder)
