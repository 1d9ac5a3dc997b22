"""The golden run: what tiny fits of every method gave when frozen, to compare with now.

    python tests/golden.py write FOLDER        # freezes the present code's values
    python tests/golden.py compare FOLDER      # compares bit by bit, on the machine that wrote them

`test_golden.py` compares with tests/golden to 1e-5: weights that were trained on another processor
differ in their last bits. All settings are spelled out, so that a new default does not change a
golden value.
"""

import contextlib
import io
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bayestune import METHODS, Draws, Lora, Training, make_scorer, save_posterior
from bayestune.adapters import held_noise
from bayestune.bench import Grid, TaskSettings
from bayestune.cli import main
from bayestune.evaluation import EvaluationOptions
from bayestune.session import TaskOptions
from tiny import byte_level_tokenizer, coloured_questions, labelled_sentences, tiny_bert, tiny_llama

SCORINGS, SEEDS = ("letter", "text", "head"), (1, 2)
BLOB = {
    "prior_std": 0.2,
    "init_root_std": 0.05,
    "noise": "row",
    "final_std": 0.1,
    "kl_lr": None,
    "schedule": "constant",
    "std_optimizer": "sgd",
    "std_lr": None,
    "layers": "all",
}
MLE: dict[str, Any] = {"method": "mle"}
SETTINGS: dict[str, dict[str, Any]] = {
    "mle": {},
    "map": {"weight_decay": 1e-5, "prior_std": 0.5},
    "mc_dropout": {"base": MLE, "dropout": 0.1, "masks": "held"},
    "ensemble": {"base": MLE, "size": 2, "seed_step": 1000},
    "bbb": BLOB,
    "laplace": {},
    "blob": BLOB,
    "blob_authors": {
        **BLOB,
        "noise": "token",
        "final_std": None,
        "kl_lr": 0.01,
        "schedule": "bursts",
    },
    "tfb": {"base": MLE, "anchors": 6, "draws": 2, "evaluations": 3},
    "temperature": {"base": MLE},
    "posterior_scale": {"base": {"method": "blob", **BLOB}, "factors": (0.5, 1.0)},
    "ivon": {"learning_rate": 1.0},
    "swag": {"rate": 1.0, "every": 1},
    "scalabl": {},
    "dalorra": {"init_kept": 0.9},
    "early_stopping": {"every": 2},
    "distilled": {"base": {"method": "blob", **BLOB}, "steps": 3, "learning_rate": 1e-3},
}
TRAINING = {
    "steps": 4,
    "epochs": None,
    "batch_size": 4,
    "accumulation": 1,
    "learning_rate": 1e-3,
    "warmup_ratio": 0.06,
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "bf16": False,
    "gradient_checkpointing": False,
    "group_by_length": False,
    "save_steps": None,
    "logging_steps": 1,
    "progress": False,
}
VOLATILE = ("seconds", "peak_memory_mb", "versions", "revision", "date", "fit")
COMMANDS = {
    "fit": ["--output", "out"],
    "evaluate": ["--posterior", "in"],
    "predict": ["--posterior", "in", "--input", "rows.jsonl"],
    "bayesianise": ["in", "--anchor", "rows.jsonl", "--output", "out"],
    "compare": ["--output", "out"],
    "bench": ["--output", "out"],
    "table": ["results"],
    "report": ["results", "--to", "report.html"],
    "demo": [],
}


def make_method(name: str, settings: dict[str, Any]) -> Any:
    """The method of these settings, whose base may be settings too."""
    settings = dict(settings)
    if isinstance(settings.get("base"), dict):
        base = dict(settings["base"])
        settings["base"] = make_method(base.pop("method"), base)
    return METHODS[name](**settings)


def training(seed: int, scoring: str = "letter") -> Training:
    """The training of a seed, every field given."""
    targets = ("query", "value") if scoring == "head" else ("q_proj", "v_proj")
    return Training(lora=Lora(rank=2, alpha=4, dropout=0.0, targets=targets), seed=seed, **TRAINING)


def fitted(name: str, scoring: str, seed: int) -> dict[str, Tensor]:
    """Draws' logits, one draw, and all saved tensors of a fit, by name."""
    base, task = (
        (tiny_bert, labelled_sentences())
        if scoring == "head"
        else (tiny_llama, coloured_questions())
    )
    scorer = make_scorer(base(), byte_level_tokenizer(), task, scoring)
    posterior = make_method(name, SETTINGS[name]).fit(base(), scorer, training(seed, scoring))
    batch = scorer.collate(scorer.encode(task.evaluation))
    batch.pop("labels")
    found = {"logits": posterior.logits(batch, Draws(3)).nan_to_num(neginf=-100.0)}
    if posterior.has_mean:
        found["mean"] = posterior.logits(batch, Draws(0)).nan_to_num(neginf=-100.0)
    if hasattr(posterior, "draw"):
        found |= {f"draw/{slot}": weight for slot, weight in posterior.draw(1, seed=3).items()}
    with tempfile.TemporaryDirectory() as scratch:
        folder = save_posterior(posterior, Path(scratch))
        for path in sorted(folder.rglob("*.safetensors")):
            place = path.relative_to(folder).as_posix().removesuffix(".safetensors")
            found |= {f"{place}/{key}": value for key, value in load_file(path).items()}
    return {
        f"{name}/{scoring}/{seed}/{key}": value.detach().contiguous().clone()
        for key, value in found.items()
    }


def addresses() -> dict[str, Tensor]:
    """Held noise at some addresses."""
    places = (
        "laplace",
        "low rank",
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.q_proj.lora_B",
    )
    return {
        f"noise/{place}/{seed}/{index}": held_noise((2, 3), seed, index, place)
        for place in places
        for seed, index in ((0, 0), (0, 1), (5, 3))
    }


def configurations() -> dict[str, str]:
    """What `--print_config` of each command prints."""
    printed = {}
    for command, arguments in COMMANDS.items():
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
            main([command, *arguments, "--print_config"])
        printed[command] = out.getvalue()
    return printed


def grid_keys() -> list[str]:
    """The keys of a grid over embedded questions, whose settings differ by task and method."""
    grid = Grid(
        models=("tiny",),
        tasks={
            "everyday": TaskSettings(training={"steps": 3}, methods={"blob": {"prior_std": 0.3}})
        },
        methods={
            "mle": None,
            "blob": {"final_std": 0.1, "schedule": "constant"},
            "long": {"method": "mle", "training": {"group_by_length": True}},
            "temperature": {"base": "mle"},
            "ensemble": {"base": "blob", "size": 3},
        },
        seeds=(1, 2),
        questions=TaskOptions(train_rows=8, evaluation_rows=6, holdout=0.1, scoring="text"),
        training=Training(
            lora=Lora(rank=2, alpha=4, dropout=0.0, targets=("q_proj",)), seed=1, **TRAINING
        ),
        predicting=EvaluationOptions(draws=(0, 2)),
    )
    return [cell.key for cell in grid.cells(grid.load_all())]


def write_rows(folder: Path) -> None:
    """The tiny task as the user's own files."""
    task = coloured_questions()
    for name, rows in {"train": task.train, "test": task.evaluation}.items():
        lines = [
            json.dumps({**asdict(row), "answer": row.options[row.answer]}) + "\n" for row in rows
        ]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def records() -> list[dict[str, Any]]:
    """The records of `compare`, without what differs from run to run."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_rows(folder)
        tiny_llama().save_pretrained(folder / "model")
        byte_level_tokenizer().save_pretrained(folder / "model")
        methods = "[mle,blob,ensemble,mc_dropout]"
        arguments = ["--model", folder / "model", "--data", folder / "train.jsonl"]
        arguments += [
            "--evaluation_data",
            folder / "test.jsonl",
            "--methods",
            methods,
            "--output",
            folder / "out",
        ]
        arguments += [
            "--steps",
            4,
            "--learning_rate",
            1e-3,
            "--lora.rank",
            2,
            "--lora.targets",
            "[q_proj,v_proj]",
        ]
        arguments += [
            "--draws",
            "[0,2]",
            "--resamples",
            50,
            "--blob.final_std",
            0.1,
            "--blob.schedule",
            "constant",
        ]
        arguments += ["--progress", "false"]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert main(["compare", *map(str, arguments)]) == 0
        lines = (folder / "out/records.jsonl").read_text(encoding="utf-8").splitlines()
        made = [json.loads(line) for line in lines]
        for record in made:
            rows = (folder / "out" / record["predictions"]).read_text(encoding="utf-8").splitlines()
            record["probabilities"] = [json.loads(row)["probabilities"] for row in rows]
    return [{key: value for key, value in record.items() if key not in VOLATILE} for record in made]


def texts() -> dict[str, Any]:
    """All golden values that are not tensors."""
    return {"configurations": configurations(), "grid_keys": grid_keys(), "records": records()}


def all_tensors() -> dict[str, Tensor]:
    """All golden tensors."""
    found = addresses()
    for name in SETTINGS:
        for scoring in SCORINGS:
            for seed in SEEDS:
                found |= fitted(name, scoring, seed)
    return found


def compare(folder: Path) -> list[str]:
    """What is not bit for bit as in the folder."""
    expected, tensors = load_file(folder / "tensors.safetensors"), all_tensors()
    wrong = sorted(set(expected) ^ set(tensors))
    wrong += [
        name
        for name in set(expected) & set(tensors)
        if not torch.equal(expected[name], tensors[name])
    ]
    known, found = (
        json.loads((folder / "texts.json").read_text(encoding="utf-8")),
        json.loads(json.dumps(texts())),
    )
    return wrong + [f"{key}: {found[key]}" for key in known if known[key] != found[key]]


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[2])
    if sys.argv[1] == "write":
        place.mkdir(parents=True, exist_ok=True)
        save_file(all_tensors(), place / "tensors.safetensors")
        (place / "texts.json").write_text(
            json.dumps(texts(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    else:
        differences = compare(place)
        print("\n".join(differences) or "all golden values are the same, bit for bit")
        sys.exit(bool(differences))
