"""A newcomer's path: the first tutorial's commands, from an empty environment, each timed.

    python benchmarks/newcomer.py [--record results/newcomer/records.jsonl]

The commands are those of docs/tutorials/ten_minutes.md and no others: one shell runs them in a new
folder, where the page's `git clone` finds this checkout's last commit. Pip downloads anew, and the
model is unpacked anew. Wall seconds are the clock's; CPU seconds are of all processes that ended,
which a busy machine does not lengthen. The record is a JSON line with the machine's facts.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/tutorials/ten_minutes.md"
REPOSITORY = "https://github.com/bayestune/bayestune"
sys.path.insert(0, str(ROOT / "docs/making"))

from page_code import FENCE, commands_of  # noqa: E402

MARK = "@step"
LIMIT = 3600  # seconds of the whole path
HEADING = re.compile(r"^## (.+)$", re.MULTILINE)


class Step(NamedTuple):
    """A command of the page, and the section that it stands in."""

    section: str
    command: str


def steps_of(markdown: str) -> list[Step]:
    """The shell commands of a page, in order."""
    found = []
    for block in FENCE.finditer(markdown):
        if block["language"] == "bash":
            sections = HEADING.findall(markdown[: block.start()])
            found += [Step(sections[-1], command) for command in commands_of(block["text"])]
    return found


def script_of(steps: Sequence[Step]) -> str:
    """A script that runs them and prints the clock and the processor's time after each."""
    lines = ["set -em", f"echo; echo {MARK} $EPOCHREALTIME; times; echo"]
    for step in steps:
        lines += [step.command, f"echo; echo {MARK} $EPOCHREALTIME; times; echo"]
    return "\n".join(lines) + "\n"


def run(steps: Sequence[Step]) -> tuple[list[dict[str, float]], str]:
    """Runs the steps; returns the seconds of each that was finished, and what was printed."""
    with tempfile.TemporaryDirectory() as folder:
        mirror = {
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": f"url.{ROOT}.insteadOf",
            "GIT_CONFIG_VALUE_0": REPOSITORY,
        }
        fresh = {"BAYESTUNE_CACHE": f"{folder}/cache", "PIP_NO_CACHE_DIR": "1", "TMPDIR": folder}
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        done = subprocess.run(
            ["bash", "-c", script_of(steps)],
            cwd=folder,
            env=kept | mirror | fresh,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT,
            check=False,
        )
    return list(seconds_of(done.stdout)), done.stdout


def seconds_of(printed: str) -> Iterator[dict[str, float]]:
    """Wall and CPU seconds of each step, from the marks between them."""
    before = None
    for part in printed.split(f"{MARK} ")[1:]:
        wall = float(part.split()[0].replace(",", "."))
        spent = re.findall(r"(\d+)m([\d.,]+)s", part.split("\n\n")[0])[:4]
        cpu = sum(60 * int(m) + float(s.replace(",", ".")) for m, s in spent)
        if before:
            yield {"wall": round(wall - before[0], 1), "cpu": round(cpu - before[1], 1)}
        before = (wall, cpu)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the page, prints the table, and appends a record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path, help="a file of JSON lines to append to")
    given = parser.parse_args(arguments)
    steps = steps_of(PAGE.read_text(encoding="utf-8"))
    load = os.getloadavg()[0]
    taken, printed = run(steps)
    pairs = zip(steps, taken, strict=False)  # a failed step ends the path
    rows = [{"section": s.section, "command": s.command, **t} for s, t in pairs]
    whole = {kind: round(sum(row[kind] for row in rows), 1) for kind in ("wall", "cpu")}
    for row in rows:
        first = row["command"].splitlines()[0][:60]
        print(f"{row['wall']:8.1f} s  {row['cpu']:8.1f} s of CPU  {first}")
    print(f"{whole['wall']:8.1f} s  {whole['cpu']:8.1f} s of CPU  in all")
    if len(taken) < len(steps):
        print(printed[-4000:], file=sys.stderr)
        return 1
    start = re.findall(r'^\{"model".*', printed, re.MULTILINE)[-1]
    answer, _ = json.JSONDecoder().raw_decode(start)  # the service's log may follow on the line
    said = [line for line in printed.splitlines() if line.startswith("Kept: ")]
    said += [line for line in printed.splitlines() if "error rate" in line or "acts on" in line][:2]
    print(json.dumps(answer), *said, sep="\n")
    if given.record:
        record = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "revision": _revision(),
            "machine": _machine(),
            "load": round(load, 2),
            "whole": whole,
            "steps": rows,
            "answer": answer,
            "calibration": said,
        }
        given.record.parent.mkdir(parents=True, exist_ok=True)
        with given.record.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    return 0


def _machine() -> dict[str, object]:
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    cores = len(os.sched_getaffinity(0))
    return {"processor": names[0] if names else platform.processor(), "cores": cores}


def _revision() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


if __name__ == "__main__":
    raise SystemExit(main())
