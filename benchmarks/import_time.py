"""Seconds that bayestune adds to importing transformers and peft, each sample in a fresh process.

transformers imports its parts when they are first used, so some of what bayestune's names take is transformers' own
Trainer, which any fine-tuning script loads; every second sample loads it beforehand, to tell the two apart.
"""

import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence

import torch

from harness import Case, Spread, environment, order_of, parser_of, quantile, report

BAR_SECONDS = 0.3
PLAIN, AFTER_TRAINER = "after transformers and peft", "after transformers.Trainer too"
BASES = {
    PLAIN: "import transformers, peft",
    AFTER_TRAINER: "import transformers, peft; from transformers import Trainer, TrainerCallback, TrainingArguments",
}
NAMES = """
names = [name for name in ("bayesify", "KLStep", "predict") if hasattr(bayestune, name)]
if len(names) < 3:
    from bayestune.kl import KLStep
    from bayestune.lora import bayesify
    from bayestune.posterior import predict
"""
PROGRAM = """
import json, sys, time
laps = []
for statements in sys.argv[1:]:
    begin = time.perf_counter()
    exec(statements)
    laps.append(time.perf_counter() - begin)
print(json.dumps(laps))
"""


def laps_of(base: str) -> list[float]:
    """Seconds of the base's imports, of `import bayestune`, and of its public names, in a fresh process."""
    settings = {
        name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"
    }
    command = [sys.executable, "-c", PROGRAM, BASES[base], "import bayestune", NAMES]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=settings)
    return json.loads(done.stdout.splitlines()[-1])


def measure(options: Namespace) -> dict[str, list[list[float]]]:
    """The laps of each base in each turn, interleaved; the warm-up fills the caches of bytecode and of files."""
    samples: dict[str, list[list[float]]] = {base: [] for base in BASES}
    for turn in range(options.warmup + options.repeats):
        for base in order_of(list(BASES), turn):
            laps = laps_of(base)
            if turn >= options.warmup:
                samples[base].append(laps)
    return samples


def cases_of(base: str, samples: Sequence[Sequence[float]]) -> list[Case]:
    """Two lines: the package alone, and with its public names."""
    cases = []
    for name, laps in {"import bayestune": 1, "and its public names": 2}.items():
        added = [sum(sample[1 : 1 + laps]) for sample in samples]
        ratios = [1 + more / sample[0] for more, sample in zip(added, samples, strict=True)]
        amounts = {
            "base": quantile([sample[0] for sample in samples], 0.5),
            "added": quantile(added, 0.5),
        }
        amounts |= {"added_q1": quantile(added, 0.25), "added_q3": quantile(added, 0.75)}
        cases.append(
            Case(f"{name}, {base}; bar: added ≤ {BAR_SECONDS} s", Spread.of(ratios), None, amounts)
        )
    return cases


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and reports."""
    parser = parser_of(__doc__, repeats=9)
    parser.set_defaults(warmup=1)
    options = parser.parse_args(arguments)
    where = environment(torch.device("cpu"))
    cases = [case for base, samples in measure(options).items() for case in cases_of(base, samples)]
    report("import_time", "Import time with bayestune / without", cases, options, where)


if __name__ == "__main__":
    main()
