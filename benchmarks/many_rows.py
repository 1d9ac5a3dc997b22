"""Many rows through `bayestune predict`: rows a second, and whether the memory grows.

The command runs as a process of its own. Whenever another tenth of the answers is written, its
resident memory is read. Without a posterior, a random Llama of two layers is fitted for three
steps: then it is the work around the model that is measured.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from harness import Case, Spread, parser_of, run

TENTHS = 10
OPTIONS = ["billing", "shipping", "returns", "something else"]


@dataclass(frozen=True)
class ReadOptions:
    """How many answers there were, after how long, and the resident memory."""

    answers: int
    seconds: float
    megabytes: float


def write_rows(path: Path, count: int, *, answers: bool) -> Path:
    """Rows that all differ."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            kind = "Old ticket" if answers else "Ticket"
            text = f"{kind} {number}: what is order {7 * number % 9973} about, and who answers?"
            row = {"question": text, "options": OPTIONS}
            if answers:
                row["answer"] = OPTIONS[number % len(OPTIONS)]
            file.write(json.dumps(row) + "\n")
    return path


def small_model(folder: Path) -> Path:
    """A random Llama of two layers with a byte-level tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([], trainer)
    ends = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **ends)
    fast.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=len(fast), num_attention_heads=4, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def bayestune(*arguments: object) -> list[str]:
    """A command line."""
    return [sys.executable, "-m", "bayestune", *map(str, arguments), "--quiet"]


def small_posterior(folder: Path) -> Path:
    """A posterior over adapters of a small model."""
    rows = write_rows(folder / "train.jsonl", 8, answers=True)
    model = small_model(folder / "model")
    command = bayestune("fit", "--model", model, "--data", rows, "--output", folder / "fit")
    subprocess.run([*command, "--steps", "3", "--batch_size", "4"], check=True)
    return folder / "fit"


def memory_of(process: int) -> float:
    """Resident memory of a process in MB."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def readings(process: subprocess.Popen[bytes], output: Path, count: int) -> Iterator[ReadOptions]:
    """A reading whenever another tenth of the answers is written."""
    begin = time.perf_counter()
    written = 0
    place = 0
    goal = count // TENTHS
    while process.poll() is None and written < count:
        time.sleep(0.05)
        if not output.exists():
            continue
        with output.open("rb") as file:
            file.seek(place)
            text = file.read()
        place += len(text)
        written += text.count(b"\n")
        if written >= goal:
            goal += count // TENTHS
            yield ReadOptions(written, time.perf_counter() - begin, memory_of(process.pid))


def measure(options: Namespace, _: torch.device) -> tuple[str, list[Case]]:
    """The command's rates and memory, tenth by tenth."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        posterior = options.posterior or small_posterior(folder)
        rows = write_rows(folder / "rows.jsonl", options.count, answers=False)
        output = folder / "answers.jsonl"
        command = bayestune("predict", posterior, "--rows", rows, "--output", output)
        command += ["--draws", str(options.draws)]
        env = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        with subprocess.Popen(command, env=env) as process:
            found = list(readings(process, output, options.count))
        if process.returncode or len(found) < TENTHS - 1:
            raise SystemExit(f"predict ended with {process.returncode}")
    for one in found:
        print(f"{one.answers:8d} rows  {one.seconds:7.1f} s  {one.megabytes:7.0f} MB")
    return f"{options.count} rows through predict, {options.draws} draws", cases_of(found)


def cases_of(found: Sequence[ReadOptions]) -> list[Case]:
    """Memory and rate at the end over those at the beginning."""
    first = found[0]
    last = found[-1]
    grown = {"end": last.megabytes, "first tenth": first.megabytes}
    memory = Case(
        "memory, end / first tenth", Spread.of([last.megabytes / first.megabytes]), grown, "MB"
    )
    rates = []
    for one, other in itertools.pairwise(found):
        rates.append((other.answers - one.answers) / (other.seconds - one.seconds))
    speed = {"last tenth": rates[-1], "second tenth": rates[0]}
    steady = Case(
        "rate, last tenth / second", Spread.of([rates[-1] / rates[0]]), speed, "rows a second"
    )
    return [memory, steady]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and reports."""
    parser: ArgumentParser = parser_of(__doc__, repeats=1)
    parser.add_argument("--posterior", type=Path, help="a folder of `fit`; left out: a small one")
    parser.add_argument("--count", type=int, default=100_000, help="rows")
    parser.add_argument("--draws", type=int, default=10, help="of each row")
    run("many_rows", parser.parse_args(arguments), measure)


if __name__ == "__main__":
    main()
