"""The authors' code and ours on the same prompts, rows, order and start: NLL and ECE side by side.

    python -m studies.official_results run --official CHECKOUT --model MODEL --data_root DATA
    python -m studies.official_results table

OpenBookQA in the regime of the evidence, see configs/evidence/grid.yaml and studies/evidence.md, by
BLoB and by plain LoRA: with the authors' code; with ours in its manner, which starts from their
values of A, B and σ and takes their batches, settings, noise by token and bursts; with ours as the
grid has it. All read the authors' prompts and answer tokens. Run again, it goes on after the last
record.
"""

import argparse
import gzip
import logging
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from bayestune.data import Question, Task
from bayestune.methods import changed
from bayestune.models import load_model
from bayestune.runtime import revision, versions
from bayestune.scoring import LetterScorer
from bayestune.session import TaskOptions, name_in_records
from bayestune.training import Training
from bayestune.whole_files import JsonRow, json_line, read_json_lines, write_json_lines
from studies.official_arms import ARMS, Bench, TheirPrompts, draws_of
from studies.official_runs import Official
from studies.official_table import table

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "results/official"
GRID = ROOT / "configs/evidence/grid.yaml"
TASK = "openbookqa"
DATA = Path("allenai/openbookqa/main")  # under a data root
Record = dict[str, Any]


def opened(options: argparse.Namespace, seed: int) -> Bench:
    """The bench of one seed, whose training rows are the grid's under it."""
    grid = yaml.safe_load(GRID.read_text(encoding="utf-8"))
    given = {**grid["questions"], **grid["tasks"][TASK]["questions"]}
    given |= {"train_rows": options.train_rows, "evaluation_rows": options.rows}
    asked = changed(TaskOptions(f"{TASK}_authors", options.data_root), given)
    task = replace(asked, subset_seed=seed, evaluation_seed=0).load()
    dtype = getattr(torch, options.dtype)
    # products and softmax, which is faster to train on a CPU over short rows: the same for all
    loaded = load_model(options.model, dtype=dtype, attn_implementation="eager")
    narrow = dtype is torch.bfloat16
    training = changed(Training(progress=False), grid["training"])
    training = replace(training, steps=options.steps, seed=seed, bf16=narrow)
    official = Official(
        options.official,
        loaded,
        rows_of(task.train, options.data_root, "train"),
        rows_of(task.evaluation, options.data_root, "validation"),
        options.steps,
        "bf16" if narrow else "fp32",
    )
    prompts, letters = official.prompts()
    scorer = TheirPrompts(loaded.tokenizer, task, prompts=prompts, letters=letters)
    return Bench(official, task, scorer, training, grid["methods"]["blob"], options.draws)


def rows_of(questions: Sequence[Question], data_root: Path, split: str) -> list[JsonRow]:
    """The rows of a split as the data set has them, in the order of questions."""
    by_id = {row["id"]: row for row in read_json_lines(data_root / DATA / f"{split}.jsonl")}
    return [by_id[question.id] for question in questions]


def same_prompts(bench: Bench) -> int:
    """How many of the prompts are, token by token, those of our task `openbookqa_authors`."""
    own = LetterScorer(bench.scorer.tokenizer, bench.task, max_length=10**6)
    rows = (*bench.task.train, *bench.task.evaluation)
    return sum(own.encode_row(row)["ids"] == bench.scorer.prompts[row.id] for row in rows)


def run(options: argparse.Namespace) -> None:
    """Fits and evaluates what the file of records lacks; writes each arm's records as it ends."""
    path = options.output / "records.jsonl"
    (options.output / "rows").mkdir(parents=True, exist_ok=True)
    facts = {
        "study": "official_results",
        "checkout": options.revision or checkout_revision(options.official),
        "model": name_in_records(options.model),
        "task": TASK,
        "steps": options.steps,
        "train_rows": options.train_rows,
        "n": options.rows,
        "dtype": options.dtype,
    }
    for seed in options.seeds:
        bench = None  # the model is loaded when it is needed
        for arm in options.arms:
            records = read_json_lines(path, missing_ok=True)
            key = {**facts, "arm": arm, "seed": seed}
            if draws_of(arm, options.draws) <= _done(records, key):
                continue
            bench = bench or opened(options, seed)
            key["prompts_as_ours"] = same_prompts(bench)
            for figures, probabilities in bench.measured(arm):
                record = {**key, **figures, **origin()}
                record["rows"] = keep_rows(options.output, record, bench.task, probabilities)
                records.append(record)
                logger.info("%s, seed %d, N=%d: %s", arm, seed, record["draws"], record["figures"])
            write_json_lines(path, records)


def _done(records: Sequence[Record], key: Record) -> set[int]:
    """The numbers of draws for which an arm's records are there."""
    return {record["draws"] for record in records if key.items() <= record.items()}


def origin() -> Record:
    """What the figures came from: versions, revision, date."""
    more = {name: version(name) for name in ("datasets", "torchmetrics")}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"versions": {**versions(), **more}, "revision": revision(), "date": now}


def checkout_revision(folder: Path) -> str:
    """The commit of a checkout.

    Raises:
        ValueError: if git does not know it.
    """
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode or not (folder / ".git").exists():
        raise ValueError(
            f"--revision: got none, and {folder} is no git checkout; expected the commit that it "
            "holds; give it"
        )
    return found.stdout.strip()


def keep_rows(folder: Path, record: Record, task: Task, probabilities: Tensor) -> str:
    """Writes the rows' probabilities, gzipped; returns the file's name in the folder."""
    whose, method = ARMS[record["arm"]]
    name = f"rows/{method}-{whose}-{record['draws']}-{record['seed']}.jsonl.gz".replace(" ", "_")
    lines = []
    for row, found in zip(task.evaluation, probabilities.tolist(), strict=True):
        lines.append(json_line({"id": row.id, "answer": row.answer, "probabilities": found}))
    (folder / name).write_bytes(gzip.compress("".join(lines).encode(), mtime=0))
    return name


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("what", choices=("run", "table"))
    add("--official", type=Path, help="a checkout of the authors' code")
    add("--revision", default=None, help="its commit, where git does not know it")
    add("--model", help="directory or name of a causal model")
    add("--data_root", type=Path, help="folder of the data sets")
    add("--seeds", type=int, nargs="+", default=[1, 2])
    add("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    add("--steps", type=int, default=240, help="of a fit, with batch 4")
    add("--train_rows", type=int, default=120)
    add("--rows", type=int, default=200, help="to evaluate on; a multiple of 4, for theirs")
    add("--draws", type=int, default=10)
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add("--output", type=Path, default=FOLDER)
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what is missing, or writes the table."""
    made = parser()
    options = made.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if options.what == "run":
        missing = [n for n in ("official", "model", "data_root") if getattr(options, n) is None]
        if missing or options.rows % 4 or options.train_rows % 4:
            made.error(f"run needs --official, --model, --data_root and whole batches; {missing}")
        run(options)
        return
    text = table(options.output)
    (options.output / "table.md").write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
