"""The service under clients that ask without a pause, over offline prediction of the same rows.

`bayestune serve` runs as a process of its own on this machine, and the clients share its cores. In
turns, the rows are predicted offline, as `bayestune predict` does, and the clients ask for them one
by one. Every answer must come, and be that of `predict` to 1e-5, decision and set included.
"""

import http.client
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import harness
from bayestune.data import Question
from bayestune.session import (
    Artefact,
    CalibratedPredictor,
    PredictionOptions,
    read_calibration,
    rows_for_artefact,
)
from harness import Case, Spread, parser_of, quantile

TOLERANCE = 1e-5
SAME = ("choice", "decision", "set")
SERVED = "served"
OFFLINE = "offline"


@dataclass
class Tally:
    """What the clients saw: milliseconds of each answer, and what was wrong."""

    milliseconds: list[float] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    unlike: list[str] = field(default_factory=list)

    def compare(self, line: dict[str, Any], expected: dict[str, Any]) -> None:
        """Notes an answer that is not that of `predict`."""
        pairs = zip(line["probabilities"], expected["probabilities"], strict=True)
        gap = max(abs(one - other) for one, other in pairs)
        differ = [name for name in SAME if line[name] != expected.get(name)]
        if gap > TOLERANCE or differ:
            self.unlike.append(f"{expected['id']}: {gap:.2g} {differ}")


@contextmanager
def service(options: Namespace) -> Iterator[int]:
    """The process of the service; yields its port."""
    command = [sys.executable, "-m", "bayestune", "serve", str(options.posterior), "--port=0"]
    command += [f"--model={options.model}"] if options.model else []
    env = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith("listening"):
                raise SystemExit("the service did not start")
            yield int(line.rsplit(":", 1)[1])
        finally:
            process.terminate()


def offline(options: Namespace) -> tuple[CalibratedPredictor, Sequence[Question]]:
    """What predicts as `bayestune predict` does, and the rows."""
    calibration = read_calibration(options.posterior)
    way = PredictionOptions.of(calibration.settings) if calibration else None
    rows = rows_for_artefact(options.rows, options.posterior, labelled=False)[: options.most]
    opened = Artefact.open(options.posterior, rows, None, options.model, way)
    own = way or PredictionOptions(bf16=opened.fit.bf16)
    session = replace(opened.session, progress=False)
    return CalibratedPredictor(session, opened.fit, own, calibration), opened.rows


def body_of(row: Question) -> bytes:
    """The request of a row."""
    told = {"question": row.question, "options": list(row.options), "context": row.context}
    return json.dumps(told).encode()


def asked(
    port: int, bodies: Sequence[bytes], lines: Sequence[dict[str, Any]], options: Namespace
) -> tuple[float, Tally]:
    """Answers a second, of so many clients for so many seconds."""
    tally = Tally()
    turns = itertools.count()
    seconds = options.seconds / options.repeats
    begin = time.perf_counter()

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        headers = {"content-type": "application/json"}
        while time.perf_counter() - begin < seconds:
            number = next(turns) % len(bodies)
            start = time.perf_counter()
            try:
                connection.request("POST", "/v1/decisions", bodies[number], headers)
                reply = connection.getresponse()
                text = reply.read()
            except OSError as problem:
                tally.lost.append(str(problem))
                continue
            tally.milliseconds.append(1000 * (time.perf_counter() - start))
            if reply.status != 200:
                tally.lost.append(f"{reply.status} {text[:200]!r}")
            else:
                tally.compare(json.loads(text), lines[number])
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(options.clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(tally.milliseconds) / (time.perf_counter() - begin), tally


def measure(options: Namespace, _: torch.device) -> tuple[str, list[Case]]:
    """Interleaved turns of offline prediction and of the service under load."""
    predictor, rows = offline(options)
    lines = list(predictor.answers(rows))
    bodies = [body_of(row) for row in rows]
    rates: dict[str, list[float]] = {SERVED: [], OFFLINE: []}
    whole = Tally()
    with service(options) as port:
        asked(port, bodies, lines, Namespace(**{**vars(options), "seconds": 2, "repeats": 1}))
        for _ in range(options.repeats):
            begin = time.perf_counter()
            list(predictor.answers(rows))
            rates[OFFLINE].append(len(rows) / (time.perf_counter() - begin))
            rate, tally = asked(port, bodies, lines, options)
            rates[SERVED].append(rate)
            whole.milliseconds += tally.milliseconds
            whole.lost += tally.lost
            whole.unlike += tally.unlike
    for problem in (*whole.lost[:5], *whole.unlike[:5]):
        print(problem)
    if whole.lost or whole.unlike:
        raise SystemExit(f"{len(whole.lost)} answers lost, {len(whole.unlike)} not as predicted")
    case = harness.ratio_case("throughput, served / offline", rates, (SERVED, OFFLINE), "rows/s")
    slow = quantile(whole.milliseconds, 0.95)
    usual = quantile(whole.milliseconds, 0.5)
    latency = Case(
        "latency, 95 % / median", Spread.of([slow / usual]), {"median": usual, "95 %": slow}, "ms"
    )
    count = len(whole.milliseconds)
    title = f"{count} answers to {options.clients} clients, none lost, all as predicted to 1e-5"
    return title, [case, latency]


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the options and runs."""
    parser: ArgumentParser = parser_of(__doc__, repeats=6)
    parser.add_argument("posterior", type=Path, help="a folder of `fit`, perhaps calibrated")
    parser.add_argument("--rows", type=Path, required=True, help="JSONL or CSV rows")
    parser.add_argument("--most", type=int, default=256, help="rows to take")
    parser.add_argument("--model", default=None, help="the base model, where it has moved")
    parser.add_argument("--clients", type=int, default=32, help="that ask without a pause")
    parser.add_argument("--seconds", type=float, default=60.0, help="of load, over all turns")
    harness.run("serve_load", parser.parse_args(arguments), measure)


if __name__ == "__main__":
    main()
